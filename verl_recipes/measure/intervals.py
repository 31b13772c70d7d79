"""A mean over problems with its 95% confidence interval.

The unit is the problem, because the samples of one problem depend on each other and problems do not. Every figure is a
mean of one value for each problem, and its interval says what other problems of the same kind could have given.

**Shares** (accuracy, pass@k, truncation) have Wilson's score interval with an effective sample size
(reward_score/figures.py). **Lengths and counts** have Student's t interval. Tests simulate the coverage.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from reward_score.figures import share_interval, t_quantile

Figure = list[float]  # value, low end, high end


def t_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Student's t interval of the mean of values, shape (problems,)."""
    size = len(values)
    if size < 2:
        return -np.inf, np.inf
    mean, half = values.mean(), t_quantile(size) * values.std(ddof=1) / np.sqrt(size)
    return mean - half, mean + half


def figure(values: Iterable[float], *, share: bool = True) -> Figure:
    """The mean of one value for each problem (at least one), with its interval.

    If a share leaves 0..1, which a user's own reward may cause, it has a t interval.
    """
    array = np.fromiter(values, float)
    share = share and array.min() >= 0 and array.max() <= 1
    low, high = share_interval(array.tolist()) if share else t_interval(array)
    return [float(array.mean()), float(low), float(high)]
