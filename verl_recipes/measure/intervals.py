"""A mean over problems with its 95% confidence interval.

The unit is the problem, because the samples of one problem depend on each other and problems do not. Every figure is a
mean of one value for each problem, and its interval says what other problems of the same kind could have given.

**Shares** (accuracy, pass@k, truncation) have a Wilson score interval with Student's quantile and the effective sample
size m (1 - m) / (s² / P) of P problems with mean m and variance s²: Korn and Graubard, Survey Methodology 24 (1998)
193-201, with Wilson's interval in place of Clopper and Pearson's. Unlike the bootstrap and the t interval it stays
right near 0 and 1, which is where pass@k often lies. If fewer than FEW problems differ from 0, or from 1, the variance
is not reliable, and the effective size is P. **Lengths and counts** have Student's t interval. Tests simulate the
coverage.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Figure = list[float]  # value, low end, high end

CONFIDENCE = 0.95
FEW = 10


@cache
def t_quantile(size: int) -> float:
    """Student's two-sided quantile for a mean of `size` values."""
    from scipy.special import stdtrit  # scipy.stats has it too, but takes a second to import

    return float(stdtrit(size - 1, (1 + CONFIDENCE) / 2))


def t_interval(values: Array) -> tuple[float, float]:
    """Student's t interval of the mean of values, shape (problems,)."""
    size = len(values)
    if size < 2:
        return -np.inf, np.inf
    mean, half = values.mean(), t_quantile(size) * values.std(ddof=1) / np.sqrt(size)
    return mean - half, mean + half


def share_interval(values: Array) -> tuple[float, float]:
    """Interval of the mean of values in 0..1, shape (problems,); see the top."""
    size = len(values)
    if size < 2:
        return 0.0, 1.0
    mean, variance, effective = values.mean(), values.var(ddof=1), float(size)
    if variance > 0 and min((values != 0).sum(), (values != 1).sum()) >= FEW:
        effective = mean * (1 - mean) / (variance / size)
    q = t_quantile(size) ** 2 / effective
    half = np.sqrt(q * mean * (1 - mean) + q * q / 4)
    return max(0.0, (mean + q / 2 - half) / (1 + q)), min(1.0, (mean + q / 2 + half) / (1 + q))


def figure(values: Iterable[float], *, share: bool = True) -> Figure:
    """The mean of one value for each problem (at least one), with its interval.

    If a share leaves 0..1, which a user's own reward may cause, it has a t interval.
    """
    array = np.fromiter(values, float)
    share = share and array.min() >= 0 and array.max() <= 1
    low, high = share_interval(array) if share else t_interval(array)
    return [float(array.mean()), float(low), float(high)]
