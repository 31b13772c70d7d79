"""The verdict on a response (reward_score/countdown.py)."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.solver import expressions
from reward_score import random_control
from reward_score.countdown import compute_score, evaluate, extract_answer, parse

TRUTH = {"numbers": [11, 18, 25], "target": 175}
RIGHT = {"score": 1.0, "acc": 1.0, "format": 1.0}
WRONG = {"score": 0.1, "acc": 0.0, "format": 1.0}
MALFORMED = {"score": 0.0, "acc": 0.0, "format": 0.0}


def verdict(response):
    return compute_score("countdown", response, TRUTH)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("18-11=7</think>\n<answer> (18 - 11) * 25 </answer>", RIGHT),
        ("</think><answer>\n25*(18-11)\n</answer>\nI am sure.", RIGHT),
        ("</think><answer>-25*(11-18)</answer>", RIGHT),
        ("</think><answer>18-11*25</answer>", WRONG),
        ("</think><answer>175</answer>", WRONG),  # the numbers must be used
        ("</think><answer>(18-11)*25*1</answer>", WRONG),
        ("</think><answer>(18-11)*25/(11-11)</answer>", WRONG),
        ("</think><answer>18/(11-11)</answer>", WRONG),
        ("</think><answer>(18-11)*25 = 175</answer>", MALFORMED),
        ("</think><answer>(18-11)25</answer>", MALFORMED),
        ("</think><answer>(18-11*25</answer>", MALFORMED),
        ("</think><answer></answer>", MALFORMED),
        ("</think><answer>(18-11)*25", MALFORMED),
        ("<answer>(18-11)*25</answer>", MALFORMED),  # the thought never closed
        ("</think><think><answer>(18-11)*25</answer>", MALFORMED),  # nor the second one
        ("", MALFORMED),
    ],
)
def test_golden_verdicts(response, expected):
    assert verdict(response) == expected


@pytest.mark.parametrize(
    "trick", ["2**3", "7//2+1", "1.5*2", "9**9**9", "0x10+1", "1_000", "٣+4", "__import__('os')", "011"]
)
def test_what_fools_or_hangs_other_scorers_is_malformed(trick):
    assert (
        compute_score("", f"</think><answer>{trick}</answer>", {"numbers": [1, 2, 3, 5, 7], "target": 8}) == MALFORMED
    )


def test_the_last_answer_after_the_thought_counts():
    assert verdict("<answer>1</answer></think><answer>(18-11)*25</answer> no: <answer>18+11+25</answer>") == WRONG
    assert verdict("</think><answer>18+11+25</answer> no: <answer>(18-11)*25</answer>") == RIGHT
    assert extract_answer("</think><answer>1<answer>2</answer>") == "2"


@given(st.text(max_size=300) | st.text("<>/thinkaswer()+-*/0123456789 \n", max_size=300))
def test_no_response_raises_and_the_keys_are_always_the_same(response):
    for text in (response, f"</think><answer>{response}</answer>"):
        assert verdict(text).keys() == RIGHT.keys()
        assert random_control.compute_score("countdown", text, TRUTH).keys() == RIGHT.keys()


@given(st.lists(st.integers(1, 99), min_size=2, max_size=3), st.randoms())
def test_every_solution_of_the_solver_is_right_and_no_other_value_is(numbers, rng):
    value, expression = rng.choice(list(expressions(numbers)))
    if value.denominator == 1:
        response = f"</think><answer>{expression}</answer>"
        assert compute_score("", response, {"numbers": numbers, "target": int(value)})["acc"] == 1.0
        assert compute_score("", response, {"numbers": numbers, "target": int(value) + 1})["acc"] == 0.0


def combined(inner):
    return st.tuples(inner, st.sampled_from("+-*"), inner).map("({0[0]}{0[1]}{0[2]})".format)


@given(st.recursive(st.integers(0, 99).map(str), combined, max_leaves=12))
def test_arithmetic_agrees_with_pythons(expression):
    assert evaluate(parse(expression)) == Fraction(eval(expression))


@pytest.mark.parametrize("depth", [10, 400, 100_000])
def test_nesting_neither_recurses_nor_overflows(depth):
    expression = "(" * depth + "18" + ")" * depth
    assert verdict(f"</think><answer>{expression}</answer>")["format"] == float(depth <= 400)


def test_numbers_may_come_as_parquet_gives_them():
    numpy = pytest.importorskip("numpy")
    for numbers in ((11, 18, 25), numpy.array([11, 18, 25])):
        assert compute_score("", "</think><answer>(18-11)*25</answer>", {"numbers": numbers, "target": 175}) == RIGHT


@pytest.mark.parametrize(
    "truth", [{}, {"numbers": [1]}, {"numbers": None, "target": 1}, {"numbers": [1], "target": "x"}]
)
def test_a_malformed_ground_truth_is_an_error_and_not_a_silent_zero(truth):
    with pytest.raises(ValueError, match="ground truth"):
        compute_score("countdown", "", truth)
