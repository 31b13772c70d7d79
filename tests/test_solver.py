"""The solver (data_prep/solver.py), against a second one and by itself."""

import random

import numpy as np
import pytest
from brute_force import agree, random_problem, verdict
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.solver import SYMBOLS, forms, reachable, solve, solve_many, write

NUMBERS = st.lists(st.integers(1, 99), min_size=2, max_size=4)


@pytest.mark.slow
def test_the_functions_of_k_operands_are_as_many_as_oeis_a140606_counts():
    assert [len(forms(k).value) for k in range(1, 7)] == [1, 6, 68, 1170, 27142, 793002]


@pytest.mark.slow
def test_it_agrees_with_the_brute_force_on_random_problems():
    rng = random.Random(2)
    for _ in range(60):
        problem = random_problem(rng, 4)
        assert agree(*problem), problem


@pytest.mark.slow
@settings(max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=3, max_size=4), st.integers(1, 12))
def test_it_agrees_where_numbers_repeat_and_zeros_are_met(numbers, target):
    assert agree(numbers, target)


@pytest.mark.parametrize(
    ("numbers", "target", "expression", "solutions", "additive", "fraction"),
    [
        ([44, 19, 35], 98, "44 + 35 + 19", 1, True, False),
        ([3, 3, 8, 8], 24, "8 / (3 - 8 / 3)", 1, False, True),
        ([25, 50, 75, 100, 3, 6], 952, "(100 + 3) * 75 * 6 / 50 + 25", None, False, False),
        ([2, 2], 1, "2 / 2", 1, False, False),
        ([1, 5], 5, "5 * 1", 2, False, False),  # and 5 / 1
    ],
)
def test_known_problems(numbers, target, expression, solutions, additive, fraction):
    solution = solve(numbers, target)
    assert sorted(solution.expression) == sorted(expression)  # up to the order of commuting operands
    assert solutions in (None, solution.solutions)
    assert (solution.additive, solution.fraction) == (additive, fraction)


def test_a_problem_without_a_solution_gives_none():
    assert solve([1, 1, 1], 100) is None


@pytest.mark.parametrize(("numbers", "target"), [([5], 5), ([1] * 7, 7), ([0, 5], 5), ([2, 3], 0), ([2, -3], 1)])
def test_what_is_no_problem_is_an_error(numbers, target):
    with pytest.raises(ValueError, match="positive"):
        solve(numbers, target)


@settings(max_examples=30)
@given(NUMBERS, st.integers(1, 100), st.randoms())
def test_the_order_of_the_numbers_does_not_matter(numbers, target, rng):
    shuffled = rng.sample(numbers, len(numbers))
    assert solve(numbers, target) == solve(shuffled, target)


@settings(max_examples=20)
@given(st.lists(st.integers(10**5, 10**6), min_size=3, max_size=3), st.integers(1, 10**6))
def test_numbers_too_large_for_64_bits_are_solved_exactly(numbers, target):
    a, b, c = numbers
    assert solve([a, b, c], a * b * c) is not None
    assert (solve(numbers, target) is None) == (verdict(numbers, target) is None)


def test_a_batch_says_what_each_problem_says():
    rng = np.random.default_rng(3)
    numbers, targets = rng.integers(1, 30, (600, 4)), rng.integers(1, 101, 600)
    solved = solve_many(numbers, targets)
    for i in range(0, 600, 7):
        one = solve(numbers[i].tolist(), int(targets[i]))
        assert (one.solutions if one else 0) == solved.solutions[i]
        if one:
            assert (one.additive, one.fraction) == (solved.additive[i], solved.fraction[i])
            assert one.expression == write(numbers[i].tolist(), int(solved.form[i]))


@settings(max_examples=20)
@given(NUMBERS)
def test_the_reachable_targets_are_those_that_have_a_solution(numbers):
    without = 1 << SYMBOLS.index("*") | 1 << SYMBOLS.index("/")
    row = np.array([numbers])
    some, whole, plain = (
        reachable(row, 1, 40, **options)[0] for options in ({}, {"integers": True}, {"without": without})
    )
    for target in range(1, 41):
        solution = solve(numbers, target)
        assert some[target - 1] == (solution is not None)
        assert whole[target - 1] == (solution is not None and not solution.fraction)
        assert plain[target - 1] == (solution is not None and solution.additive)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_fields_of_a_form_describe_its_expression(k):
    for i, (uses, parentheses) in enumerate(zip(forms(k).uses, forms(k).parentheses, strict=True)):
        text = write([11, 22, 33, 44][:k], i)
        assert {SYMBOLS[bit] for bit in range(4) if uses >> bit & 1} == set(text) & set(SYMBOLS), text
        assert text.count("(") == parentheses
