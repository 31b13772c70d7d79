"""Figures as text."""

from collections.abc import Sequence


def interval(figure: Sequence[float]) -> str:
    """A figure with its interval.

    >>> interval([0.5, 0.4375, 0.5625]), interval([104.2, 99.0, 109.4])
    ('0.500 (0.438 to 0.562)', '104.2 (99.0 to 109.4)')
    """
    value, low, high = (f"{x:.3f}" if abs(figure[0]) < 10 else f"{x:.1f}" for x in figure)
    return f"{value} ({low} to {high})"
