"""The arithmetic of a written search: steps on two numbers, the steps of a solution, and steps drawn at random.

    >>> steps = [(17, "*", 3, 51), (51, "+", 19, 70)]
    >>> expression(steps)
    '17 * 3 + 19'

A step takes two numbers out of a pool and puts its result in. Traces of the tiny base model (verl_recipes/tiny_base.py)
and traces in words (data_prep/wording.py) are made of these steps.
"""

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from data_prep.solver import Flat

Number = int | Fraction
N = TypeVar("N", bound=Number)
Step = tuple[Number, str, Number, Number]  # left, operator, right, result
Whole = tuple[int, str, int, int]  # a step on integers
Key = tuple[Number, str, Number]

DRAWS = 20  # give up if none of this many random steps will do
SUM, PRODUCT, ATOM = range(3)  # how tightly an expression holds together


def steps_between(a: int, b: int, max_value: int) -> list[Whole]:
    """The operations on a and b, in this order, whose results are integers in 0..max_value."""
    results = {"+": a + b, "-": a - b, "*": a * b} | ({"/": a // b} if b and a % b == 0 else {})
    return [(a, operator, b, value) for operator, value in results.items() if 0 <= value <= max_value]


def key_of(step: Step) -> Key:
    """What two steps have in common if they differ at most by the order of a sum or a product."""
    a, operator, b, _ = step
    return (min(a, b), operator, max(a, b)) if operator in "+*" else (a, operator, b)


def after(pool: Sequence[N], step: tuple[N, str, N, N]) -> list[N]:
    """The numbers that remain after a step: its result, then the others in their order."""
    rest = list(pool)
    rest.remove(step[0])
    rest.remove(step[2])
    return [step[3], *rest]


def expression(steps: Sequence[Step], *, blank: str = " ", sparing: bool = True) -> str:
    """Steps, of which each result but the last is used by a later step, as one expression.

    Args:
        blank: stands around each operator.
        sparing: write only the parentheses that are needed, instead of those around every step.

    >>> steps = [(17, "*", 3, 51), (51, "+", 19, 70)]
    >>> expression(steps, blank="", sparing=False)
    '(17*3)+19'
    """
    made: list[tuple[Number, str, int]] = []  # results that no step has used yet: value, text, SUM or PRODUCT
    text = ""
    for a, operator, b, value in steps:
        tight = SUM if operator in "+-" else PRODUCT
        sides = []
        # a - (b + c) and a / (b * c) need parentheses, and a + (b - c) and a * (b / c) do not.
        for number, needed in ((a, tight), (b, tight + (operator in "-/"))):
            part = next((each for each in made if each[0] == number), None)
            if part is not None:
                made.remove(part)
            _, inner, holds = part or (number, str(number), ATOM)
            sides.append(f"({inner})" if part and (not sparing or holds < needed) else inner)
        text = f"{sides[0]}{blank}{operator}{blank}{sides[1]}"
        made.append((value, text, tight))
    return text


def solution_steps(node: Flat, numbers: Sequence[int], rng: random.Random) -> list[Step]:
    """The steps of a function (data_prep/solver.py, `flat`) of the numbers, in an order drawn at random.

    No result is negative: a sum that would be negative is subtracted the other way round, and the sign moves outwards.
    A quotient is taken only if it is an integer, or if nothing is left to multiply. So all results are integers if the
    solver finds no fraction on the way.
    """
    steps: list[Step] = []
    _make(node, numbers, rng, steps)
    return steps


def _make(node: Flat, numbers: Sequence[int], rng: random.Random, steps: list[Step]) -> tuple[bool, Number]:
    """Append the steps of a function; return whether it is negative, and its absolute value."""
    if isinstance(node, int):
        return False, numbers[node]
    family, terms = node
    made = [(inverted, *_make(term, numbers, rng, steps)) for inverted, term in rng.sample(terms, len(terms))]
    if family == "+":
        plain, others = ([value for no, negative, value in made if (no != negative) == side] for side in (False, True))
        minus = sum(plain) < sum(others) or not plain
        return minus, _chain(others, plain, "+-", steps) if minus else _chain(plain, others, "+-", steps)
    plain, others = ([value for no, _, value in made if no == side] for side in (False, True))
    return sum(negative for _, negative, _ in made) % 2 == 1, _chain(plain, others, "*/", steps)


def _chain(plain: list[Number], inverted: list[Number], signs: str, steps: list[Step]) -> Number:
    """Append the steps of a sum or a product, whose value is not negative, and return it.

    Whatever keeps the value so far a number >= 0, and an integer if possible, comes as soon as it can.
    """
    value, *plain = plain
    while plain or inverted:
        undo = next((each for each in inverted if _fits(value, each, signs) or not plain), None)
        if undo is None:
            other, sign = plain.pop(0), signs[0]
            result: Number = value + other if sign == "+" else value * other
        else:
            inverted.remove(undo)
            other, sign = undo, signs[1]
            result = value - other if sign == "-" else Fraction(value) / other
        if isinstance(result, Fraction) and result.denominator == 1:
            result = result.numerator
        steps.append((value, sign, other, result))
        value = result
    return value


def _fits(value: Number, other: Number, signs: str) -> bool:
    """Whether value - other is positive, or value / other an integer > 0."""
    return value > other if signs[1] == "-" else value > 0 and value % other == 0


def random_step(pool: Sequence[int], largest: int, avoid: set[Key], rng: random.Random) -> Whole | None:
    """A step on two numbers of a pool, with a result in 1..largest; None if no draw gives one that is not to avoid."""
    for _ in range(DRAWS):
        a, b = rng.sample(pool, 2)
        some = [step for step in steps_between(a, b, largest) if step[3] and key_of(step) not in avoid]
        if some:
            return rng.choice(some)
    return None


def last_step(pool: Sequence[int], target: int, avoid: set[Key], rng: random.Random) -> Whole | None:
    """A step on the last two numbers that misses the target; None if all that do are to avoid."""
    a, b = pool
    both = steps_between(a, b, a * b + a + b) + [step for step in steps_between(b, a, b + a) if step[1] in "-/"]
    some = [step for step in both if step[3] != target and key_of(step) not in avoid]
    return rng.choice(some) if some else None
