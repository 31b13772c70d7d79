"""Exact solver: which values a set of numbers can make, and one expression that makes a given value.

    >>> solve([44, 19, 35], 98)
    '((44 + 19) + 35)'

Combining two of the numbers gives a smaller problem, so every expression that uses each number once is reached by
combining until one is left. Six numbers have 2.8 million such orders; up to four take well under a millisecond each.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations

Term = tuple[Fraction, str]  # a value and an expression that has it


def _combine(left: Term, right: Term) -> Iterator[Term]:
    (a, x), (b, y) = left, right
    yield a + b, f"({x} + {y})"
    yield a - b, f"({x} - {y})"
    yield b - a, f"({y} - {x})"
    yield a * b, f"({x} * {y})"
    if b:
        yield a / b, f"({x} / {y})"
    if a:
        yield b / a, f"({y} / {x})"


def _search(terms: list[Term], allowed: range | None) -> Iterator[Term]:
    if len(terms) == 1:
        yield terms[0]
        return
    for i, j in combinations(range(len(terms)), 2):
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for term in _combine(terms[i], terms[j]):
            if allowed is None or (term[0].denominator == 1 and int(term[0]) in allowed):
                yield from _search([*rest, term], allowed)


def expressions(numbers: Sequence[int], allowed: range | None = None) -> Iterator[Term]:
    """Every (value, expression) that uses each of `numbers` once.

    Args:
        numbers: one or more integers.
        allowed: where given, only intermediate results in this range (so integers) are followed.
    """
    return _search([(Fraction(n), str(n)) for n in numbers], allowed)


def solve(numbers: Sequence[int], target: int) -> str | None:
    """An expression that uses each of `numbers` once and equals `target` exactly, or None where there is none."""
    return next((expression for value, expression in expressions(numbers) if value == target), None)
