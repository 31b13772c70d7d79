"""What verl_recipes/measure/behaviours.py finds, against labels and against what must not cost or break."""

import json
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import repeats

from benchmarks.behaviours import ROOT, table
from verl_recipes.measure.behaviours import BEHAVIOURS, behaviours, statements

TRACES = [json.loads(line) for line in (ROOT / "tests" / "behaviour_traces.jsonl").read_text("utf-8").splitlines()]


def test_there_are_enough_labelled_traces_of_every_kind():
    assert len(TRACES) >= 200
    assert len({(trace["text"], trace["target"]) for trace in TRACES}) == len(TRACES)
    shown = Counter((name, trace["language"]) for trace in TRACES for name in trace["shows"])
    assert min(shown[name, language] for name in BEHAVIOURS for language in ("en", "zh")) >= 8
    assert sum(not trace["shows"] for trace in TRACES) >= 50


@pytest.mark.parametrize("name", ["docs/behaviours.md", "docs/zh/behaviours.md"])
def test_the_page_shows_the_precision_and_recall_that_the_rules_have(name):
    assert repeats(name, (ROOT / name).read_text("utf-8"), table(TRACES))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("35/19=1.84, 35/19=1.8, 35/19=1.9", [True, True, False]),
        ("10*2=20+5=25", [True, True]),
        ("8/(3-8/3)=24 and 24=8/(3-8/3)", [True, True]),
        ("3 × 4 ＝ 13", [False]),
        ("1/0=0", [False]),
        ("25=25, x=3, 3+=4, (=), =", []),
        ("9" * 300 + "+1=2, 1+1=2", [True]),
    ],
)
def test_a_statement_is_true_or_false_by_exact_arithmetic(text, expected):
    assert [each.true for each in statements(text)] == expected


def test_candidates_repeats_and_what_follows_the_thought():
    found = behaviours(
        "1+2=3,3+4=7 no\n1*2=2,2*4=8 yes\n1+2=3,3+4=7 no</think>4-2=2 no<answer>1*2*4</answer>", [1, 2, 4], 8
    )
    assert (found["candidates"], found["repeats"], found["statements"], found["verification"]) == (3, 1, 6, 3)
    assert found["backtracking"] == 1  # the second was right, so the third drops nothing


def test_mixed_language_and_degenerate_ends_are_seen():
    assert behaviours("so 3 + 4 不 对", [3, 4], 7)["language_mixing"] == pytest.approx(1 / 3)
    assert behaviours("!" * 500, [3, 4], 7)["repetition"] == 1.0


@pytest.mark.slow
@given(st.text(st.sampled_from("0123456789+-*/()=. \n,×÷xneed不要凑=\ud800\x00"), max_size=80), st.integers(0, 100))
def test_no_text_breaks_anything(text, target):
    found = behaviours(text, [3, 4, 25], target)
    assert all(value >= 0 for value in found.values())
    assert found["true_statements"] <= found["statements"]
    assert found["repeats"] <= max(found["candidates"] - 1, 0)


HOSTILE = [
    "=",
    "(",
    "9",
    "1+",
    "1 =",
    "need ",
    "1.",
    "3 x ",
    " no",
    "\n",
    "((1)=",
    "1+1 wait ",
    "0*0=7,",
    "need 3 of 凑 ",
]


def steps(text):
    """How many function calls and lines the analysis of a text takes: the same on every machine."""
    count = 0

    def tracer(frame, event, _):
        nonlocal count
        count += 1
        return tracer

    sys.settrace(tracer)
    try:
        behaviours(text, [3, 4, 9], 81)
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("unit", HOSTILE)
def test_twice_the_hostile_text_takes_twice_the_steps(unit):
    assert steps(unit * 600) < 2.5 * steps(unit * 300) + 1000


@pytest.mark.slow
@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("characters", [200_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_a_megabyte_of_hostile_text_is_read(unit, characters):
    found = behaviours(unit * (characters // len(unit)), [3, 4, 9], 81)
    assert found.keys() == behaviours("", [3, 4, 9], 81).keys()
    assert all(0 <= count <= characters for count in found.values())
