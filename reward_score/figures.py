"""Figures over problems: pass@k, and the interval of a mean of shares. Standard library only.

The unit is the problem, because the samples of one problem depend on each other and problems do not. The interval is
Wilson's score interval with Student's quantile and the effective sample size m (1 - m) / (s² / P) of P problems with
mean m and variance s²: Korn and Graubard, Survey Methodology 24 (1998) 193-201, with Wilson's interval in place of
Clopper and Pearson's. Unlike the bootstrap and the t interval it stays right near 0 and 1, which is where pass@k often
lies. If fewer than FEW problems differ from 0, or from 1, the variance is not reliable, and the effective size is P.
"""

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean, variance

CONFIDENCE = 0.95
FEW = 10


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, if `correct` of n samples are.

    1 - C(n - correct, k) / C(n, k), for k up to n: equation 1 of arXiv 2107.03374 (Codex).

    >>> pass_at_k(8, 1, 1)
    0.125
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def t_share(t: float, freedom: int) -> float:
    """The probability that |T| <= t for Student's T (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle) ** 2, freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for j in range(2 + odd, freedom - 1, 2):
        term *= cosine * (j - 1) / j
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@cache
def t_quantile(size: int) -> float:
    """Student's two-sided quantile for a mean of `size` values, at least two, by bisection.

    >>> round(t_quantile(2), 4), round(t_quantile(64), 4)
    (12.7062, 1.9983)
    """
    low, high = 1.0, 13.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_share(middle, size - 1) < CONFIDENCE else (low, middle)
    return high


def share_interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval of the mean of values in 0..1, one for each problem; see the top."""
    size = len(values)
    if size < 2:
        return 0.0, 1.0
    mean, spread, effective = fmean(values), variance(values), float(size)
    if spread > 0 and min(sum(value != 0 for value in values), sum(value != 1 for value in values)) >= FEW:
        effective = mean * (1 - mean) / (spread / size)
    q = t_quantile(size) ** 2 / effective
    half = math.sqrt(q * mean * (1 - mean) + q * q / 4)
    return max(0.0, (mean + q / 2 - half) / (1 + q)), min(1.0, (mean + q / 2 + half) / (1 + q))


def interval(figure: Sequence[float]) -> str:
    """A figure with its interval, as text.

    >>> interval([0.5, 0.4375, 0.5625]), interval([104.2, 99.0, 109.4])
    ('0.500 (0.438 to 0.562)', '104.2 (99.0 to 109.4)')
    """
    value, low, high = (f"{x:.3f}" if abs(figure[0]) < 10 else f"{x:.1f}" for x in figure)
    return f"{value} ({low} to {high})"
