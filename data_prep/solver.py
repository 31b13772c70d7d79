"""An exact solver over the rationals, for one problem of 2 to 6 numbers or for whole data sets.

    >>> solve([44, 19, 35], 98)
    Solution(expression='44 + 35 + 19', solutions=1, additive=True, fraction=False)
    >>> solve([3, 3, 8, 8], 24).expression
    '8 / (3 - 8 / 3)'

**What counts as one solution.** A solution uses every number exactly once, with + - * / and no unary minus. Two
solutions are the same if they are the same function of their operands, for all values of the operands. Then commuting
and re-associating turn one into the other, where a - b is a + (-b) and a / b is a * (1 / b), and signs move through
products: a - (b - c) is (a + c) - b, and (a - b) * (c - d) is (b - a) * (d - c). Equal numbers are interchangeable. All
other solutions differ: a * 1 and a / 1 are two. A solution is defined if none of its denominators is zero when it is
written flat, as (x * y) / (z * w) with sums or numbers for x, y, z, w.

**How.** On k distinct operands there are 1, 6, 68, 1170, 27142, 793002 such functions (OEIS A140606); `forms(k)` lists
them, each as one operation on two smaller ones. A batch of problems is evaluated level by level over all subsets of
the numbers, a row of the array for each function and a column for each problem, as pairs (numerator, denominator).
Their values at two random points modulo the prime 2**31 - 1 show which functions are the same, and which become the
same if operands are equal; the counts above show that no two were confused.

**Overflow.** Let m(k) bound the unreduced numerator and denominator of a function of k numbers up to N. m(1) = N, and a
sum is at most m(i) * m(j) + m(j) * m(i), so m(k) <= 2**(k-1) * N**k by induction. The comparison with a target T
multiplies a denominator, at most m(i) * m(j), by T. If max(2, T) * 2**(k-2) * N**k < 2**63, the pairs are int64.
Otherwise they are Python's integers, which are slower and just as exact.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MAX_COUNT = 6
PRIME = (1 << 31) - 1
ADD, SUBTRACT, MULTIPLY, DIVIDE = range(4)
SYMBOLS = "+-*/"
COLUMNS = 256  # the most problems that are evaluated at once
ENTRIES = 1 << 22  # the most values of functions of fewer operands that are kept for them: 70 MB
CELLS = 32_768  # functions times problems in one array operation, so that it fits in the CPU's cache
POINTS = np.random.default_rng(98).integers(1, PRIME, (MAX_COUNT, 2))  # row i: two values of operand i


class Forms(NamedTuple):
    """The functions of k operands, shortest first. All arrays have one entry for each function.

    A function applies `operator` to function number `left` of the operands in `left_set` (bit i: operand i) and to
    function number `right` of the other operands. The next fields are about the function written flat: `parentheses` is
    the number of pairs; `uses` has bit i if SYMBOLS[i] occurs, and `inside` if it occurs within a term or factor;
    `plain` is the number of terms or factors with + or *, and `inverted` of those with - or /. `value` is its value at
    POINTS, as one number.
    """

    operator: Array
    left_set: Array
    left: Array
    right_set: Array
    right: Array
    parentheses: Array
    uses: Array
    inside: Array
    plain: Array
    inverted: Array
    value: Array


class Solution(NamedTuple):
    """A shortest solution; how many there are; whether one has neither * nor /; whether all need a fraction."""

    expression: str
    solutions: int
    additive: bool
    fraction: bool


class Solved(NamedTuple):
    """`Solution` for many problems. `form` is an index into `forms` for the sorted numbers, -1 without a solution."""

    solutions: Array
    form: Array
    additive: Array
    fraction: Array


def _members(subset: int) -> list[int]:
    return [i for i in range(MAX_COUNT) if subset >> i & 1]


def _modulo(values: Array) -> Array:
    """`values` < 2**62 modulo PRIME, in 0..PRIME."""
    values = (values & PRIME) + (values >> 31)
    return (values & PRIME) + (values >> 31)


def _fingerprint(numerator: Array, denominator: Array) -> Array:
    """The quotients modulo PRIME at both points, as one number for each function. Inputs have shape (functions, 2)."""
    inverse, power = denominator, PRIME - 2  # Fermat: x ** (p - 2) = 1 / x
    for bit in bin(power)[3:]:
        inverse = _modulo(inverse * inverse)
        if bit == "1":
            inverse = _modulo(inverse * denominator)
    quotient = _modulo(numerator * inverse) % PRIME
    return quotient[:, 0] << 31 | quotient[:, 1]


def _apply(operator: int, a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    """Numerator and denominator of (a / b) `operator` (c / d); 0 / 0 if it is not defined."""
    if operator == ADD:
        return a * d + c * b, b * d
    if operator == SUBTRACT:
        return a * d - c * b, b * d
    if operator == MULTIPLY:
        return a * c, b * d
    return a * d * (c != 0), b * c


class Plan(NamedTuple):
    """How all functions of all proper subsets of n operands are computed, smaller subsets first.

    Each of `steps` is (operator, first, left, right): functions number first, first + 1, ... are this operator applied
    to the functions with the numbers in left and right. `number[subset]` has the numbers of a subset's
    functions. `_last` has the functions of all n operands.
    """

    steps: list[tuple[int, int, Array, Array]]
    number: dict[int, Array]
    size: int


@cache
def _plan(n: int) -> Plan:
    steps, number, size = [], {1 << i: np.array([i]) for i in range(n)}, n
    for k in range(2, n):
        subsets = [sum(1 << i for i in members) for members in combinations(range(n), k)]
        for subset in subsets:
            number[subset] = np.empty(len(forms(k).operator), np.int64)
        for operator in range(4):
            chosen = np.flatnonzero(forms(k).operator == operator)
            sides = [_operands(k, chosen, subset, number) for subset in subsets]
            for i, subset in enumerate(subsets):
                number[subset][chosen] = size + i * len(chosen) + np.arange(len(chosen))
            left, right = (np.concatenate(side) for side in zip(*sides, strict=True))
            steps.append((operator, size, left, right))
            size += len(left)
    return Plan(steps, number, size)


@cache
def _last(n: int) -> list[tuple[int, Array, Array, Array]]:
    """The functions of all n operands: (operator, indices into forms(n), left and right as in `Plan`)."""
    chosen = [np.flatnonzero(forms(n).operator == operator) for operator in range(4)]
    return [(i, some, *_operands(n, some, 2**n - 1, _plan(n).number)) for i, some in enumerate(chosen)]


def _operands(k: int, chosen: Array, subset: int, number: dict[int, Array]) -> tuple[Array, Array]:
    """The numbers, in a plan, of the left and right operands of functions of a subset with k members."""
    form, members, sides = forms(k), _members(subset), []
    for which, index in ((form.left_set, form.left), (form.right_set, form.right)):
        side = np.empty(len(chosen), np.int64)
        for part in np.unique(which[chosen]):
            here = which[chosen] == part
            side[here] = number[sum(1 << members[i] for i in _members(part))][index[chosen][here]]
        sides.append(side)
    return sides[0], sides[1]


def _at_points(n: int, points: Array) -> tuple[Array, Array]:
    """Numerators and denominators, modulo PRIME, of all functions in a plan; `points` has shape (n, 2)."""
    plan = _plan(n)
    a = np.empty((plan.size, 2), np.int64)
    b = np.ones((plan.size, 2), np.int64)
    a[:n] = points
    for operator, first, left, right in plan.steps:
        numerator, denominator = _apply_modulo(operator, a[left], b[left], a[right], b[right])
        a[first : first + len(left)], b[first : first + len(left)] = numerator, denominator
    return a, b


def _apply_modulo(operator: int, a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    if operator == SUBTRACT:
        operator, c = ADD, PRIME - c
    if operator == DIVIDE:
        operator, c, d = MULTIPLY, d, c
    if operator == ADD:
        return _modulo(_modulo(a * d) + _modulo(c * b)), _modulo(b * d)
    return _modulo(a * c), _modulo(b * d)


def _written(operator: int, *sides: tuple[Forms, Array]) -> tuple[Array, Array, Array, Array, Array]:
    """The fields parentheses, uses, inside, plain and inverted (see `Forms`) of an operation on two functions."""
    family = operator >> 1  # 0: sums, 1: products
    parentheses: Any = 0
    inside: Any = 0
    counts: list[Any] = [0, 0]  # plain, inverted
    for i, (form, index) in enumerate(sides):
        same = form.operator[index] >> 1 == family  # its terms become terms of the result
        inside |= np.where(same, form.inside[index], form.uses[index])
        parentheses += form.parentheses[index] + (family == 1) * (form.operator[index] >> 1 == 0)
        flip = i == 1 and operator in (SUBTRACT, DIVIDE)
        counts[flip] = counts[flip] + np.where(same, form.plain[index], 1)
        counts[not flip] = counts[not flip] + np.where(same, form.inverted[index], 0)
    plain, inverted = counts
    uses = inside | (plain > 1) << 2 * family | (inverted > 0) << 2 * family + 1
    return parentheses, uses, inside, plain, inverted


@cache
def forms(k: int) -> Forms:
    """All functions of k operands, those with the fewest parentheses and then the fewest * and / first."""
    if k == 1:
        zero = np.zeros(1, np.int64)
        return Forms(zero - 1, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    number = _plan(k).number
    a, b = _at_points(k, POINTS[:k])
    found = []
    for left_set in range(1, 2**k - 1):
        right_set = 2**k - 1 - left_set
        some, others = forms(left_set.bit_count()), forms(right_set.bit_count())
        for operator in range(4):
            if operator in (ADD, MULTIPLY) and left_set < right_set:
                continue  # they commute
            # A product or quotient of quotients, written flat, is another form that is defined wherever it is. So no
            # quotient is an operand of * or /.
            flat = operator in (ADD, SUBTRACT)
            left = np.flatnonzero(flat | (some.operator != DIVIDE))
            right = np.flatnonzero(flat | (others.operator != DIVIDE))
            left, right = np.repeat(left, len(right)), np.tile(right, len(left))
            x, y = number[left_set][left], number[right_set][right]
            value = _fingerprint(*_apply_modulo(operator, a[x], b[x], a[y], b[y]))
            written = _written(operator, (some, left), (others, right))
            sets = np.full_like(left, left_set), left, np.full_like(left, right_set), right
            found.append((np.full_like(left, operator), *sets, *written, value))
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    parentheses, uses, value = columns[5], columns[6], columns[-1]
    products = (uses >> MULTIPLY & 1) + (uses >> DIVIDE & 1)
    order = np.lexsort((uses, products, parentheses))  # stable, so the same everywhere
    _, first = np.unique(value[order], return_index=True)
    return Forms(*(column[order[np.sort(first)]] for column in columns))


@cache
def _exchange(n: int, i: int) -> Array:
    """The index of the function that each function becomes if operands i and i + 1 are exchanged."""
    value = forms(n).value
    points = POINTS[:n].copy()
    points[[i, i + 1]] = points[[i + 1, i]]
    a, b = _at_points(n, points)
    exchanged = np.empty_like(value)
    for operator, chosen, left, right in _last(n):
        exchanged[chosen] = _fingerprint(*_apply_modulo(operator, a[left], b[left], a[right], b[right]))
    order = np.argsort(value)
    return order[np.searchsorted(value[order], exchanged)]


@cache
def _distinct(n: int, pattern: tuple[bool, ...]) -> list[tuple[int, Array, Array, Array]]:
    """`_last(n)` without duplicates, if sorted operands i and i + 1 are equal for each true `pattern[i]`.

    Exchanges of equal operands turn some functions into each other; only the first of them stays.
    """
    label, before = np.arange(len(forms(n).value)), None
    while before is None or (label != before).any():
        before = label
        for i in np.flatnonzero(pattern):
            label = np.minimum(label, label[_exchange(n, int(i))])
    first = label == np.arange(len(label))
    return [(operator, chosen[(k := first[chosen])], left[k], right[k]) for operator, chosen, left, right in _last(n)]


def expressions(numbers: Sequence[int]) -> int:
    """How many expressions use each of the numbers once, all of them different; fewer if numbers repeat.

    >>> expressions([1, 2]), expressions([2, 2])
    (6, 4)
    """
    ordered = sorted(numbers)
    return sum(len(some) for _, some, *_ in _distinct(len(ordered), tuple(a == b for a, b in pairwise(ordered))))


def _blocks(numbers: Array) -> Iterator[tuple[Array, tuple[bool, ...]]]:
    """Indices of rows of sorted numbers with equal numbers at the same places, at most COLUMNS at once."""
    pattern = (np.diff(numbers) == 0) @ (1 << np.arange(numbers.shape[1] - 1))
    columns = min(COLUMNS, ENTRIES // _plan(numbers.shape[1]).size)
    for value in np.unique(pattern):
        rows = np.flatnonzero(pattern == value)
        equal = tuple(bool(value >> i & 1) for i in range(numbers.shape[1] - 1))
        for start in range(0, len(rows), columns):
            yield rows[start : start + columns], equal


def _levels(numbers: Array, dtype: type) -> tuple[Array, Array, Array]:
    """Numerators and denominators of all functions of fewer than n numbers, and whether no fraction is on the way.

    Args:
        numbers: shape (problems, n), sorted.
        dtype: np.int64, or object if that could overflow.

    Returns:
        Three arrays of shape (functions, problems), numbered as in `_plan(n)`.
    """
    plan = _plan(n := numbers.shape[1])
    shape = (plan.size, len(numbers))
    a: Array = np.empty(shape, dtype)
    b: Array = np.ones(shape, dtype)
    whole = np.ones(shape, bool)
    a[:n] = numbers.T
    for operator, first, left, right in plan.steps:
        here = slice(first, first + len(left))
        a[here], b[here] = _apply(operator, a[left], b[left], a[right], b[right])
        whole[here] = whole[left] & whole[right]
        if operator == DIVIDE:
            # Multiply first and divide last: a flat quotient of integers then needs a fraction only if it is one.
            whole[here] &= (b[here] != 0) & (a[here] % np.where(b[here] == 0, 1, b[here]) == 0)
    return a, b, whole


def _dtype(numbers: Array, target: int) -> type:
    """int64 if it is wide enough (see the top), else Python's integers."""
    n, largest = numbers.shape[1], int(numbers.max(initial=1))
    return np.int64 if max(2, target) * 2 ** (n - 2) * largest**n < 2**63 else object


def _hits(numbers: Array, targets: Array) -> Iterator[tuple[Array, Array, Array]]:
    """The solutions of problems with n sorted numbers each: (problems, functions, fraction-free) in parallel arrays."""
    n = numbers.shape[1]
    dtype = _dtype(numbers, int(targets.max(initial=1)))
    for rows, equal in _blocks(numbers):
        a, b, whole = _levels(numbers[rows], dtype)
        target: Array = targets[rows].astype(dtype)
        for operator, form, left, right in _distinct(n, equal):
            step = max(1, CELLS // len(rows))
            for start in range(0, len(form), step):
                x, y = left[start : start + step], right[start : start + step]
                numerator, denominator = _apply(operator, a[x], b[x], a[y], b[y])
                i, column = np.nonzero((numerator == denominator * target) & (denominator != 0))
                yield rows[column], form[start + i], whole[x[i], column] & whole[y[i], column]


def solve_many(numbers: Array, targets: Array) -> Solved:
    """Solve problems that all have the same count of numbers.

    Args:
        numbers: shape (problems, n), 2 <= n <= 6, positive integers in any order.
        targets: shape (problems,), positive integers.
    """
    numbers, size = np.sort(np.asarray(numbers), axis=1), len(targets)
    uses = forms(numbers.shape[1]).uses
    none = len(uses)
    solutions, form = np.zeros(size, np.int32), np.full(size, none, np.int32)
    additive, whole_way = np.zeros(size, bool), np.zeros(size, bool)
    for problem, function, whole in _hits(numbers, np.asarray(targets)):
        np.add.at(solutions, problem, 1)
        np.minimum.at(form, problem, function)
        additive[problem[uses[function] < 1 << MULTIPLY]] = True
        whole_way[problem[whole]] = True
    return Solved(solutions, np.where(form == none, -1, form), additive, (solutions > 0) & ~whole_way)


Flat = int | tuple[str, list[tuple[bool, Any]]]  # an operand, or "+" or "*" with (inverted, term) for each term


def flat(k: int, index: int, operands: Sequence[int]) -> Flat:
    """Function number `index` of k operands written flat: nested sums and products, inverted terms last.

    An inverted term of a sum is subtracted, and one of a product is a divisor.

    >>> flat(2, int(np.flatnonzero(forms(2).operator == DIVIDE)[0]), [0, 1])
    ('*', [(False, 0), (True, 1)])
    """
    form = forms(k)
    operator = int(form.operator[index])
    if operator < 0:
        return operands[0]
    family = "+" if operator in (ADD, SUBTRACT) else "*"
    terms: list[tuple[bool, Flat]] = []
    for subset, inner, inverted in (
        (int(form.left_set[index]), int(form.left[index]), False),
        (int(form.right_set[index]), int(form.right[index]), operator in (SUBTRACT, DIVIDE)),
    ):
        some = [operands[i] for i in _members(subset)]
        term = flat(len(some), inner, some)
        if isinstance(term, tuple) and term[0] == family:
            terms += [(inverted != flipped, each) for flipped, each in term[1]]
        else:
            terms.append((inverted, term))
    return family, sorted(terms, key=lambda each: each[0])


def _write(node: Flat, within: str = "") -> str:
    """A flat function as text with a place for each operand, in parentheses if it is a sum within a product."""
    if isinstance(node, int):
        return f"{{{node}}}"
    family, terms = node
    text = ""
    for inverted, term in terms:
        sign = "+-*/"[2 * (family == "*") + inverted]
        text += (f" {sign} " if text else "") + _write(term, family)
    return f"({text})" if (family, within) == ("+", "*") else text


@cache
def _template(k: int, index: int) -> str:
    return _write(flat(k, index, range(k)))


def write(numbers: Sequence[int], index: int) -> str:
    """Function number `index` of the sorted `numbers`, as an expression with as few parentheses as possible."""
    return _template(len(numbers), index).format(*sorted(numbers))


def solutions_of(numbers: Array, targets: Array) -> tuple[Array, Array, Array]:
    """All solutions of problems that all have the same count of numbers.

    Args:
        numbers: shape (problems, n), 2 <= n <= 6, positive integers in any order.
        targets: shape (problems,), positive integers.

    Returns:
        Three arrays with an entry for each solution, problem after problem: the problem; the function, an index into
        `forms` for the sorted numbers; whether no fraction is on the way.
    """
    found = list(_hits(np.sort(np.asarray(numbers), axis=1), np.asarray(targets)))
    problem, function, whole = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((function, problem))
    return problem[order], function[order], whole[order]


def solve(numbers: Sequence[int], target: int) -> Solution | None:
    """Solve one problem; returns None if it has no solution.

    Args:
        numbers: 2 to 6 positive integers of any size.

    Raises:
        ValueError: there are fewer or more numbers, or one is not positive.
    """
    if not 2 <= len(numbers) <= MAX_COUNT or min(*numbers, target) < 1:
        raise ValueError(f"2 to {MAX_COUNT} positive numbers and a positive target are expected: {numbers}, {target}")
    dtype = _dtype(np.array([numbers], object), target)
    solved = solve_many(np.array([numbers], dtype), np.array([target], dtype))
    if not solved.solutions[0]:
        return None
    expression = write(numbers, int(solved.form[0]))
    return Solution(expression, int(solved.solutions[0]), bool(solved.additive[0]), bool(solved.fraction[0]))


def reachable(numbers: Array, low: int, high: int, *, integers: bool = False, without: int = 0) -> Array:
    """Which targets in low..high each problem's numbers reach, shape (problems, high - low + 1).

    Args:
        numbers: shape (problems, n), 2 <= n <= 6, positive integers.
        low, high: the range, both ends included.
        integers: count only solutions without fractions on the way.
        without: count only solutions without these operators; bit i stands for SYMBOLS[i].
    """
    numbers = np.sort(numbers, axis=1)
    n, uses = numbers.shape[1], forms(numbers.shape[1]).uses
    result = np.zeros((len(numbers), high - low + 1), bool)
    for rows, equal in _blocks(numbers):
        a, b, whole = _levels(numbers[rows], _dtype(numbers, high))
        for operator, form, left, right in _distinct(n, equal):
            chosen = np.flatnonzero(uses[form] & without == 0)
            step = max(1, CELLS // len(rows))
            for start in range(0, len(chosen), step):
                x, y = left[chosen[start : start + step]], right[chosen[start : start + step]]
                numerator, denominator = _apply(operator, a[x], b[x], a[y], b[y])
                ratio = numerator / np.where(denominator == 0, 1, denominator)
                i, column = np.nonzero((ratio >= low) & (ratio <= high) & (denominator != 0))
                value = np.rint(ratio[i, column].astype(float)).astype(np.int64)
                exact = numerator[i, column] == value * denominator[i, column]
                if integers:
                    exact &= whole[x[i], column] & whole[y[i], column]
                result[rows[column[exact]], value[exact] - low] = True
    return result
