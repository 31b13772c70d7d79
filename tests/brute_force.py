"""A second solver, slow and written apart from data_prep/solver.py: python tests/brute_force.py [problems] [seed].

It builds every binary tree over the numbers, with Fraction arithmetic, and brings each into a normal form: sums as
sorted signed terms, products as sorted factors with exponents 1 and -1 and one sign. Run as a program it compares both
solvers on random problems of 2-5 numbers and prints where they disagree; a problem of 5 takes it seconds.
"""

import random
import re
import sys
from fractions import Fraction
from functools import cache

from data_prep.solver import solve
from reward_score.grammar import evaluate, parse


def total(terms):
    """The normal form of a sum of (sign, form)."""
    flat = []
    for sign, form in terms:
        if form[0] == "sum":
            flat += [(sign * s, f) for s, f in form[1]]
        elif form[0] == "product":
            flat.append((sign * form[1], ("product", 1, form[2])))
        else:
            flat.append((sign, form))
    # 4 * (5 - 5) is its own negative, as the fives are interchangeable: its sign says nothing.
    flat = [(1 if form[0] == "product" and own_negative(form) else sign, form) for sign, form in flat]
    return "sum", tuple(sorted(flat, key=repr))


def negative(form):
    """The normal form of a sum's negative."""
    return total([(-sign, f) for sign, f in form[1]])


def own_negative(form):
    return any(f[0] == "sum" and negative(f) == f for _, f in form[2])


def product(factors):
    """The normal form of a product of (exponent, form)."""
    sign, flat = 1, []
    for exponent, form in factors:
        if form[0] == "product":
            sign *= form[1]
            flat += [(exponent * e, f) for e, f in form[2]]
        elif form[0] == "sum" and repr(negative(form)) < repr(form):
            sign = -sign
            flat.append((exponent, negative(form)))
        else:
            flat.append((exponent, form))
    result = "product", sign, tuple(sorted(flat, key=repr))
    return ("product", 1, result[2]) if own_negative(result) else result


@cache
def trees(numbers):
    """Every normal form over `numbers`, a sorted tuple: its value, and whether some tree of it meets no fraction."""
    if len(numbers) == 1:
        return {("number", numbers[0]): (Fraction(numbers[0]), True)}
    found = {}
    for subset in range(1, 2 ** len(numbers) - 1):
        left = tuple(n for i, n in enumerate(numbers) if subset >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not subset >> i & 1)
        for f, (x, whole) in trees(left).items():
            for g, (y, whole_too) in trees(right).items():
                results = [(total([(1, f), (1, g)]), x + y), (total([(1, f), (-1, g)]), x - y)]
                results.append((product([(1, f), (1, g)]), x * y))
                if y:
                    results.append((product([(1, f), (-1, g)]), x / y))
                for form, value in results:
                    no_fraction = whole and whole_too and value.denominator == 1
                    found[form] = value, no_fraction or found.get(form, (0, False))[1]
    return found


def additive(form):
    return form[0] == "number" or (form[0] == "sum" and all(additive(f) for _, f in form[1]))


def verdict(numbers, target):
    """What `solve` should say, but for the expression: (solutions, additive, fraction), or None."""
    solutions = {f: whole for f, (value, whole) in trees(tuple(sorted(numbers))).items() if value == target}
    if not solutions:
        return None
    return len(solutions), any(map(additive, solutions)), not any(solutions.values())


def agree(numbers, target):
    """Whether both solvers say the same, and the expression is one."""
    mine, right = solve(numbers, target), verdict(numbers, target)
    if mine is None or right is None:
        return mine is right
    value = evaluate(parse(mine.expression))
    used = sorted(map(int, re.findall(r"\d+", mine.expression)))
    return (mine.solutions, mine.additive, mine.fraction) == right and value == target and used == sorted(numbers)


def random_problem(rng, most):
    """Of 2 to `most` numbers, small ones often, so that equal ones and zeros occur; two in three have a solution."""
    largest = rng.choice([5, 10, 25, 99])
    numbers = sorted(rng.randint(1, largest) for _ in range(rng.randint(2, most)))
    reached = [int(v) for v, _ in trees(tuple(numbers)).values() if v.denominator == 1 and v > 0]
    return numbers, rng.choice(reached) if rng.random() < 2 / 3 else rng.randint(1, 100)


def main(problems=2000, seed=0):
    rng, wrong, counts = random.Random(int(seed)), 0, dict.fromkeys(range(2, 6), 0)
    for _ in range(int(problems)):
        numbers, target = random_problem(rng, 5)
        trees.cache_clear()
        counts[len(numbers)] += 1
        if not agree(numbers, target):
            wrong += 1
            print(numbers, target, solve(numbers, target), verdict(numbers, target))
    print(f"{problems} problems, {counts} by how many numbers: {wrong} disagreements")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
