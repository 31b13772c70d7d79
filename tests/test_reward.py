"""The verdict on a response (reward_score/)."""

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_oracle import ALL, check

from benchmarks.reward_cost import HOSTILE, block
from data_prep.cli import CONFIGS
from data_prep.solver import reachable, solve
from reward_score import components, random_control
from reward_score.components import closeness
from reward_score.countdown import check_options, compute_score
from reward_score.grammar import MAX_EXPRESSION, REASONS, ExpressionError, evaluate, judge, parse
from reward_score.profiles import PROFILES

TRUTH = {"numbers": [11, 18, 25], "target": 175}
ROOT = CONFIGS.parent


def verdict(response, truth=TRUTH, **options):
    return compute_score("countdown", response, truth, **options)


def reason(answer, truth=TRUTH, **options):
    return verdict(block(answer), truth, **options)["reason"]


# --- the grammar -----------------------------------------------------------------------------------------------------

THOUGHT, ANSWER = "18-11=7, 7*25=175</think>\n\n", "<answer>(18-11)*25</answer>"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (THOUGHT + ANSWER, "right"),  # begins inside a thought
        ("<think>\n" + THOUGHT + ANSWER, "right"),  # before any, or after an empty one
        ("<think>\n18-11=7 " + ANSWER, "no_answer"),
        ("18-11=7\n" + ANSWER, "no_answer"),  # no thought at all
    ],
)
def test_a_right_answer_is_right_wherever_the_response_begins_and_without_a_thought_if_that_is_allowed(
    response, expected
):
    assert verdict(response)["reason"] == expected
    assert verdict(response, answer_in_thought=True)["reason"] == "right"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # 1. Where the thought ends.
        ("", "no_answer"),
        ("<answer>(18-11)*25</answer>", "no_answer"),
        ("<answer>(18-11)*25</answer></think>", "no_answer"),
        ("</think><think><answer>(18-11)*25</answer>", "no_answer"),
        ("</think><think></think><answer>(18-11)*25</answer>", "right"),
        ("<think><think></think><answer>(18-11)*25</answer>", "right"),
        ("</THINK><answer>(18-11)*25</answer>", "no_answer"),
        ("</think ><answer>(18-11)*25</answer>", "no_answer"),
        # 2. Which block counts.
        ("18-11=7</think>\n<answer> (18 - 11) * 25 </answer>", "right"),
        ("</think><answer>(18-11)*25</answer>\nI am sure.", "right"),
        ("<answer>1</answer></think><answer>(18-11)*25</answer> no: <answer>18+11+25</answer>", "wrong_value"),
        ("</think><answer>18+11+25</answer> no: <answer>(18-11)*25</answer>", "right"),
        ("</think><answer>(18-11)*25</answer> or <answer>18", "right"),
        ("</think><answer>(18-11)*25</answer> or </answer>", "right"),
        ("</think><answer>(18-11)*25</answer><think><answer>11</answer>", "right"),
        ("</think><answer>1<answer>(18-11)*25</answer>", "right"),
        ("</think><answer>(18-11)<think></think>*25</answer>", "no_answer"),
        ("</think><answer>(18-11)</think>*25</answer>", "no_answer"),
        ("</think><answer>(18-11)*25", "no_answer"),
        ("</think>(18-11)*25</answer>", "no_answer"),
        ("</think><Answer>(18-11)*25</Answer>", "no_answer"),
    ],
)
def test_where_the_thought_ends_and_which_answer_counts(response, expected):
    assert verdict(response)["reason"] == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # 3. What an expression is.
        ("25*(18-11)", "right"),
        ("\n25\t*\r\n( 18\v-\f11 )\n", "right"),
        ("-25*(11-18)", "right"),
        ("--+-25*(11-18)", "right"),
        ("25*-(11-18)", "right"),
        ("((((18)-11)))*25", "right"),
        ("(" * 490 + "18" + ")" * 490 + "-11", "wrong_numbers"),
        (" " * (MAX_EXPRESSION - 10) + "(18-11)*25", "right"),
        (" " * (MAX_EXPRESSION - 9) + "(18-11)*25", "too_long"),
        ("", "syntax"),
        (" ", "syntax"),
        ("()", "syntax"),
        ("(18-11)*25 = 175", "syntax"),
        ("(18-11)25", "syntax"),
        ("18 11", "syntax"),
        ("(18)(11)", "syntax"),
        ("(18-11*25", "syntax"),
        ("18-11)*25", "syntax"),
        (")18-11(*25", "syntax"),
        ("18-", "syntax"),
        ("*18", "syntax"),
        ("18*/11", "syntax"),
        ("018-11*25", "syntax"),
        ("00", "syntax"),
        ("18,11", "syntax"),
        ("{18-11}*25", "syntax"),
        ("\u300018-11", "syntax"),
        ("18\0-11", "syntax"),
        ("1８-11", "syntax"),
        ("\ud835\udfd9", "syntax"),
        # 4. Which numbers it uses.
        ("175", "wrong_numbers"),
        ("(18-11)*25*1", "wrong_numbers"),
        ("(18-11)*25+11-11", "wrong_numbers"),
        ("18*25", "wrong_numbers"),
        ("0", "wrong_numbers"),
        ("18/(11-11)", "wrong_numbers"),
        # 5. Its value.
        ("18-11*25", "wrong_value"),
        ("18/11*25", "wrong_value"),
    ],
)
def test_what_an_expression_is(answer, expected):
    assert reason(answer) == expected


def test_division_by_zero_is_a_reason_of_its_own_and_division_is_exact():
    assert reason("11/(18-18)", {"numbers": [11, 18, 18], "target": 1}) == "division_by_zero"
    assert reason("8/(3-8/3)", {"numbers": [3, 3, 8, 8], "target": 24}) == "right"
    assert reason("1/3*3", {"numbers": [1, 3, 3], "target": 1}) == "right"


@pytest.mark.parametrize("trick", ["2**3", "7//2+1", "1.5*2", "9**9**9", "0x10+1", "1_000", "٣+4", "__import__('os')"])
def test_what_fools_or_hangs_other_scorers_is_no_expression(trick):
    assert reason(trick, {"numbers": [1, 2, 3, 5, 7], "target": 8}) == "syntax"


@pytest.mark.parametrize(
    ("option", "answers", "refused"),
    [
        (
            "equals_target",
            ["(18-11)*25 = 175", "(18-11)*25=\n175 "],
            ["(18-11)*25 = 174", "= 175", "1 = 1"],
        ),
        ("unicode_signs", ["（18−11）×25", "25÷（1÷（18－11）)", "25＊(18-11)"], ["１８-11", "(18-11)x25"]),
        (
            "latex_fractions",
            ["(18-11)*25", r"\frac{(18-11)*25}{1}", r"\dfrac{25}{\tfrac{1}{18-11}}"],
            [r"\frac{25}", r"\frac{25}{1}{1}", r"\frac(25)(1)", r"\frac{(25}{1)}", r"{25}", r"25}{1", r"\frac{}{1}"],
        ),
    ],
)
def test_the_options_are_off_by_default_and_accept_no_more_than_they_say(option, answers, refused):
    for answer in answers:
        truth = {"numbers": [1, 11, 18, 25] if re.search(r"\b1\b", answer) else TRUTH["numbers"], "target": 175}
        assert reason(answer, truth, **{option: True}) == "right"
        assert answer == "(18-11)*25" or reason(answer, truth) == "syntax"
    for answer in refused:
        assert reason(answer, **{option: True}) == "syntax", answer


@pytest.mark.parametrize(
    ("answer", "paid"),
    [
        *(("25*(18-11)", 1.0), ("18*11-25", 0.7), ("18*11-18", 0.7), ("25*(18-11)-18/3", 0.5), ("11*18", 0.0)),
        *(("25*(18-11)*11/11", 0.0), ("175", 0.0), ("25*7", 0.0), ("18/(11-11)", 0.0)),
    ],
)
def test_the_television_rule_takes_a_subset_and_pays_by_distance(answer, paid):
    truth = {"numbers": [3, 11, 18, 18, 25], "target": 175}
    assert verdict(block(answer), truth, profile="television", subset=True)["score"] == paid
    assert verdict(block(answer), truth)["acc"] == 0.0


@pytest.mark.parametrize(
    ("answer", "paid"),
    [
        *(("25*(18-11)", 1.0), ("18*11-25", 10 / 12), ("(18+11)*25", 10 / 560)),
        *(("25*(18-11)*1", 0.0), ("25*7", 0.0), ("175", 0.0), ("18*11", 0.0), ("25/(11-11)+18", 0.0), ("174.9", 0.0)),
        ("18*11-25 = 175", 0.0),
    ],
)
def test_closeness_pays_only_an_expression_of_all_the_numbers(answer, paid):
    scored = verdict(block(answer), profile="closeness")
    assert scored["closeness"] == paid
    assert scored["score"] == pytest.approx(0.1 * scored["format"] + 0.4 * paid + 0.5 * scored["acc"])


# --- properties ------------------------------------------------------------------------------------------------------

SOUP = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "(18-11)*25",
    *"+-*/()=<>0125 8\n\t.",
    "\\frac{",
    "}{",
    "}",
    "×",
]


@given(st.text(max_size=300) | st.lists(st.sampled_from(SOUP), max_size=60).map("".join))
def test_every_verdict_agrees_with_the_oracle(response):
    check(response)
    check(f"</think><answer>{response}</answer>")


@given(st.binary(max_size=300))
def test_any_bytes_get_the_oracles_verdict(data):
    check(data.decode("utf-8", "surrogateescape"))
    check(data.decode("latin-1"))


@given(st.lists(st.integers(1, 99), min_size=2, max_size=3), st.randoms())
def test_every_solution_of_the_solver_is_right_and_no_other_value_is(numbers, rng):
    targets = np.flatnonzero(reachable(np.array([numbers]), 0, 200)[0, 1:]) + 1
    if len(targets):
        target = int(rng.choice(targets))
        expression = solve(numbers, target).expression
        assert reason(expression, {"numbers": numbers, "target": target}) == "right"
        assert reason(expression, {"numbers": numbers, "target": target + 1}) == "wrong_value"


VALUES = st.fractions() | st.integers()


@given(VALUES, VALUES, st.integers(0, 10**6))
def test_the_nearer_value_is_paid_more_and_the_target_most(first, second, target):
    off, paid = zip(*sorted((abs(Fraction(v) - target), closeness(v, target)) for v in (first, second)), strict=True)
    assert 1.0 >= paid[0] >= paid[1] >= 0.0
    assert off[0] > 0 or paid[0] == 1.0
    too_small_for_a_float = off[1] - off[0] < 1e-9 * (1 + off[1] ** 2)
    assert too_small_for_a_float or paid[0] > paid[1]


SPACE = st.text(" \n\t", max_size=2)
LEAF = st.integers(0, 99).map(lambda n: (str(n), Fraction(n), [n]))


def combined(inner):
    """Two expressions as one, with the value (None after a division by zero) and the numbers that it must have."""

    def combine(left, sign, right, space, unary):
        (a, x, p), (b, y, q) = left, right
        text = f"({unary}{a}{space}{sign}{space}{b})"
        if x is None or y is None or (sign == "/" and y == 0):
            return text, None, p + q
        x = -x if unary == "-" else x
        return text, x + y if sign == "+" else x - y if sign == "-" else x * y if sign == "*" else x / y, p + q

    return st.builds(combine, inner, st.sampled_from("+-*/"), inner, SPACE, st.sampled_from(["", "-", "+"]))


@given(st.recursive(LEAF, combined, max_leaves=8), st.integers(-1, 1))
def test_expressions_built_with_their_value_and_numbers_are_judged_by_them(built, off):
    text, value, numbers = built
    if value is None:
        assert reason(text, {"numbers": numbers, "target": 1}) == "division_by_zero"
    elif value.denominator == 1:
        assert reason(text, {"numbers": numbers, "target": int(value) + off}) == ("wrong_value" if off else "right")
    else:
        assert reason(text, {"numbers": numbers, "target": round(value)}) == "wrong_value"
    assert reason(text, {"numbers": [*numbers, 1], "target": 1}) == "wrong_numbers"
    assert value == evaluate(parse(text))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_responses_of_a_million_characters_get_a_verdict(name):
    scored = verdict(HOSTILE[name](1_000_000), weights=ALL)
    assert scored.keys() == verdict("", weights=ALL).keys()
    assert scored["acc"] == float("right answer" in name)


@pytest.mark.parametrize(
    "seconds", [pytest.param(5, marks=pytest.mark.slow), pytest.param(3600, marks=pytest.mark.long)]
)
def test_fuzzing_finds_nothing(tmp_path, seconds):
    pytest.importorskip("atheris")
    (tmp_path / "found").mkdir()
    result = subprocess.run(
        [
            *(sys.executable, ROOT / "tests" / "fuzz_reward.py", f"-max_total_time={seconds}"),
            *(f"-artifact_prefix={tmp_path}/", tmp_path / "found", ROOT / "tests" / "fuzz_corpus"),
        ],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    runs = int(re.search(r"Done (\d+) runs", result.stderr)[1])
    assert runs > 1000
    assert any((tmp_path / "found").iterdir())  # it did find new branches, so it does see the code


# --- components and profiles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "paid"),
    [
        ("countdown", {"right": 1.0, "wrong": 0.1, "words": 0.0, "none": 0.0, "long": 0.1}),
        ("tinyzero", {"right": 1.0, "wrong": 0.1, "words": 0.1, "none": 0.0, "long": 0.1}),
        ("mini_r1", {"right": 2.0, "wrong": 1.0, "words": 1.0, "none": 0.0, "long": 1.0}),
        ("datawhale_r1", {"right": 2.0, "wrong": 1.0, "words": 1.0, "none": 0.0, "long": 1.0}),
        ("datawhale_r1_article", {"right": 2.0, "wrong": 1.0, "words": 1.0, "none": 0.0, "long": 2.0}),
    ],
)
def test_what_a_profile_pays(profile, paid):
    responses = {
        "right": "no</think>\n<answer>(18-11)*25</answer>",
        "wrong": "no</think>\n<answer>18-11*25</answer>",
        "words": "no</think>\n<answer>I do not know</answer>",
        "none": "no</think>\n(18-11)*25",
        "long": "so " * 400 + "</think>\n<answer>18-11*25</answer>",
    }
    assert {name: verdict(response, profile=profile)["score"] for name, response in responses.items()} == paid


def test_the_keys_depend_on_the_profile_alone_and_one_reason_at_most_is_given():
    for profile, (weights, _) in PROFILES.items():
        keys = {"score", "acc", "format", "reason", *weights, *(f"reason/{name}" for name in REASONS)}
        for answer in ("", "18", "(18-11)*25", "1/0", " " * 2000, "18/(11-11)"):
            scored = verdict(block(answer), profile=profile)
            assert scored.keys() == keys
            assert all(type(value) is float for name, value in scored.items() if name != "reason")
            given_reasons = [name for name in REASONS if scored[f"reason/{name}"]]
            assert given_reasons == [scored["reason"]] * (scored["reason"] != "right")


def test_weights_come_on_top_of_the_profile_and_zero_only_measures():
    response = "no, </think>\n<answer>(18-11)*25</answer>" + "!" * 4000
    scored = verdict(response, weights={"repetition": -0.5, "overlong": 1.0, "language": 0, "layout": 0.0})
    assert {name: scored[name] for name in ("repetition", "language", "layout")} == {
        "repetition": 1.0,
        "language": 1.0,
        "layout": 0.0,
    }
    assert scored["overlong"] == pytest.approx((3072 - len(response)) / 1024)
    assert scored["score"] == pytest.approx(1.0 - 0.5 + scored["overlong"])
    assert verdict(response, weights={"overlong": 1.0}, max_characters=10_000)["score"] == 1.0
    assert verdict(response, weights={"language": 1.0}, language="zh")["score"] == 1.0


@given(st.text(max_size=200))
def test_components_stay_in_their_range(text):
    assert components.repetition(text) in (0.0, 1.0)
    assert components.layout(text) in (0.0, 1.0)
    assert 0.0 <= components.language(text, "en") <= 1.0
    assert -1.0 <= components.overlong(len(text), 100, 50) <= 0.0


def test_repetition_is_a_loop_and_not_a_search():
    search = "".join(f"{a}+{b}={a + b},{a + b}-{a * b}={a + b - a * b} no\n" for a in range(30) for b in range(9))
    assert components.repetition(search) == 0.0
    for loop in ("!", "so ", "11+18=29,29-25=4 no\n", "让我想想", "\ud800"):
        assert components.repetition(loop * 300) == 1.0
        assert components.repetition(search + loop * 4096) == 1.0


@pytest.mark.slow
def test_there_is_a_configuration_for_every_profile():
    from configurations import compose, options

    chosen = {
        name: compose("train", f"reward={name}").reward.custom_reward_function
        for name in options("reward")
        if name != "random"
    }
    assert {name: config.reward_kwargs.profile for name, config in chosen.items()} == {name: name for name in PROFILES}
    for config in chosen.values():
        assert verdict("", **config.reward_kwargs)["score"] == 0.0


# --- verl's contract -------------------------------------------------------------------------------------------------


def test_verl_loads_it_and_calls_it_with_the_keywords_of_the_configuration():
    """By the package's name or by the file's path."""
    reward = pytest.importorskip("verl.trainer.ppo.reward")
    from omegaconf import OmegaConf

    for path in ("pkg://reward_score.countdown", str(ROOT / "reward_score" / "countdown.py")):
        function = {"path": path, "name": "compute_score"}
        function |= {"reward_kwargs": {"profile": "tinyzero", "weights": {"language": 0.5}}}
        call = reward.get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": function}}))
        scored = call(
            data_source="countdown",
            solution_str="no</think><answer>?</answer>",
            ground_truth=TRUTH,
            extra_info={"index": 0, "num_turns": None, "rollout_reward_scores": {}},
            reward_router_address=None,
            reward_model_tokenizer=None,
        )
        assert scored["score"] == pytest.approx(0.6)


def test_verls_validation_metrics_hold_the_share_of_every_reason():
    metrics = pytest.importorskip("verl.trainer.ppo.metric_utils")
    rows = [verdict(block(answer)) for answer in ("(18-11)*25", "18", "?", "?")]
    infos = {name: [row[name] for row in rows] for name in rows[0]}
    result = metrics.process_validation_metrics(["countdown"] * 4, list("abcd"), infos)["countdown"]
    shares = {name: result[f"reason/{name}"]["mean@1"] for name in REASONS}
    assert shares == dict.fromkeys(REASONS, 0.0) | {"syntax": 0.5, "wrong_numbers": 0.25}
    assert result["acc"]["mean@1"] == 0.25
    assert "reason" not in result


def test_numbers_may_come_as_parquet_gives_them():
    numpy = pytest.importorskip("numpy")
    for numbers in ((11, 18, 25), numpy.array([11, 18, 25]), [numpy.int32(25), 18, 11]):
        assert reason("(18-11)*25", {"numbers": numbers, "target": numpy.int64(175)}) == "right"


@pytest.mark.parametrize(
    "truth",
    [
        *({}, None, "98", {"numbers": [1]}, {"numbers": None, "target": 1}, {"numbers": [], "target": 1}),
        *({"numbers": [1], "target": "x"}, {"numbers": [1], "target": 1.5}, {"numbers": ["1"], "target": 1}),
        *({"numbers": [1.5], "target": 1}, {"numbers": [-1], "target": 1}, {"numbers": "12", "target": 1}),
    ],
)
def test_a_malformed_ground_truth_is_an_error_that_names_the_row(truth):
    with pytest.raises(ValueError, match="row 7 in split train of 'countdown'"):
        compute_score("countdown", "", truth, {"split": "train", "index": 7})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "no_such"}, "no_such"),
        ({"profile": ["tinyzero"]}, "there is no reward profile"),
        ({"profil": "tinyzero"}, "profil"),
        ({"weights": {"lenght": 1}}, "lenght"),
        ({"weights": ["acc"]}, "weights is a number for each"),
        ({"weights": {"acc": "0.5x"}}, "the weight of acc is a number, not '0.5x'"),
        ({"weights": {"acc": math.nan}}, "the weight of acc"),
        ({"weights": {"acc": True}}, "the weight of acc"),
        ({"subset": "no"}, "subset is true or false, not 'no'"),
        ({"answer_in_thought": None}, "answer_in_thought is true or false"),
        ({"language": "fr"}, "fr"),
        ({"language": ["en"]}, "language is en or zh"),
        ({"max_characters": 0}, "max_characters"),
        ({"max_characters": "many"}, "max_characters"),
        ({"overlong_buffer": 0}, "overlong_buffer"),
        ({"overlong_buffer": 1.5}, "overlong_buffer"),
    ],
)
def test_a_misspelt_or_senseless_option_is_an_error_before_and_while_it_scores(options, message):
    for asked in (check_options, random_control.check_options, partial(verdict, "")):
        with pytest.raises(ValueError, match=message):
            asked(**options)


# --- the random control ----------------------------------------------------------------------------------------------


@pytest.fixture
def coins(monkeypatch):
    """A function that scores responses to row 3 as a fresh process would."""

    def of(responses, seed=0, **row):
        monkeypatch.setattr(random_control, "_seen", Counter())
        row = {"split": "train", "index": 3} | row
        return [random_control.compute_score("", text, TRUTH, row, seed=seed)["score"] for text in responses]

    return of


def test_the_control_has_the_same_keys_and_tells_the_truth_about_the_answer():
    for response in ("", block("(18-11)*25")):
        control, truth = random_control.compute_score("countdown", response, TRUTH), verdict(response)
        assert control | {"score": 0} == truth | {"score": 0}


def test_the_coins_of_a_run_can_be_repeated_whatever_the_order_of_scoring(coins):
    responses = [f"try {i % 50}" for i in range(200)]  # each four times
    first = sorted(zip(responses, coins(responses), strict=True))
    shuffled = random.Random(1).sample(responses, len(responses))
    assert sorted(zip(shuffled, coins(shuffled), strict=True)) == first
    assert sorted(zip(responses, coins(responses, seed=1), strict=True)) != first


def test_equal_responses_of_a_group_get_coins_of_their_own(coins):
    same = coins(["no"] * 1000)
    assert set(same[:8]) == {0.0, 1.0}
    assert 437 <= sum(same) <= 563  # four standard deviations


@pytest.mark.parametrize("vary", ["response", "row", "seed"])
def test_the_coins_are_fair_and_independent_over(vary, coins):
    if vary == "response":
        flips = coins([f"{i}" for i in range(1000)])
    elif vary == "row":
        flips = [coins(["no"], index=i)[0] for i in range(1000)]
    else:
        flips = [coins(["no"], seed=i)[0] for i in range(1000)]
    assert 437 <= sum(flips) <= 563
    assert 437 <= sum(a == b for a, b in pairwise(flips)) <= 563


def test_a_seed_that_is_no_integer_is_an_error():
    for seed in ("abc", 1.5, True, None):
        with pytest.raises(ValueError, match="seed is an integer"):
            random_control.check_options(seed=seed)


def test_importing_it_imports_the_standard_library_alone():
    script = "import sys, reward_score.countdown, reward_score.__main__\nprint(*{m.split('.')[0] for m in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    assert set(result.stdout.split()) <= {*sys.stdlib_module_names, "reward_score", "__main__", "__mp_main__"}


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "reward_score", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("response", "explanation"),
    [
        ("18-11=7</think><answer>(18-11)*25</answer>", "right: '(18-11)*25' (characters 23 to 32): its value is 175"),
        ("<answer>(18-11)*25</answer>", "an <answer> inside a thought does not count"),
        ("<answer>18</answer></think> so", "no <answer> follows the thought; the 1 inside it do not count"),
        ("</think><answer>18", "is closed by </answer>"),
        ("</think><answer> 2**3</answer>", "not '*' (character 19)"),
        ("</think><answer>18 + x</answer>", "'x' has no place in an expression (character 21)"),
        ("</think><answer>018</answer>", "a number begins with 0 (character 16)"),
        ("</think><answer>(18</answer>", "a parenthesis is not closed (character 19)"),
        ("</think><answer>18)</answer>", "')' closes nothing (character 18)"),
        ("</think><answer>18+11</answer>", "it uses 11, 18, and 11, 18, 25 are given"),
        ("</think><answer>18+11+25</answer>", "its value is 54, not 175"),
        ("</think><answer>" + "(" * 2000 + "</answer>", "it has 2000 characters, and 1000 are the most"),
    ],
)
def test_the_command_explains_a_verdict(response, explanation):
    result = command("--numbers", "11", "18", "25", "--target", "175", "--", response)
    assert result.returncode == 0, result.stderr
    assert explanation in result.stdout


@pytest.mark.slow
def test_the_command_scores_a_file_and_names_the_line_that_is_wrong(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [{"response": f"</think><answer>{a}</answer>", "ground_truth": TRUTH} for a in ("(18-11)*25", "?", "?")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = command(str(path), "--profile", "mini_r1")
    assert result.returncode == 0, result.stderr
    assert "3 responses, mean score 0.333" in result.stdout
    assert re.search(r"syntax +2 +66\.7%", result.stdout)
    packed = tmp_path / "samples.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert command(str(packed), "--profile", "mini_r1").stdout == result.stdout.replace(str(path), str(packed))
    path.rename(tmp_path / "other")
    assert command(str(path)).stderr == f"error: {path} does not exist, but {packed} does: name that file\n"
    assert (
        command("nowhere").stderr
        == "error: nowhere: No such file or directory; a response needs --numbers and --target\n"
    )
    (tmp_path / "other").rename(path)
    packed.write_bytes(packed.read_bytes()[:-9])
    assert (command(str(packed)).returncode, len(command(str(packed)).stderr.splitlines())) == (1, 1)
    for line, message in (
        ("{", "line 4"),
        ('{"response": "x"}', "line 4"),
        ('{"response": null, "ground_truth": {}}', "line 4"),
        ("[" * 200_000, "line 4"),
        ('{"response": "", "ground_truth": {}}', "row 4"),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + line + "\n", encoding="utf-8")
        result = command(str(path))
        assert result.returncode != 0
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert "No such file" in command("nowhere.jsonl").stderr


def test_a_file_that_was_scored_otherwise_says_so(tmp_path):
    path = tmp_path / "samples.jsonl"
    response = "so (18-11)*25 <answer>(18-11)*25</answer>"  # an answer in the thought: right for TinyZero alone
    row = {"response": response, "ground_truth": TRUTH, "score": 0.9, "reward_score": 1.0, "reason": "right"}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    said = "1 of them were recorded with another reward: name the run's --profile and options"
    assert said in command(str(path)).stdout
    assert said not in command(str(path), "--profile", "tinyzero").stdout


def test_the_order_of_the_numbers_does_not_matter():
    for numbers in ([25, 18, 11], (11, 18, 25), [11, 25, 18]):
        assert judge("</think><answer>(18-11)*25</answer>", numbers, 175).reason == "right"


def test_errors_of_the_parser_point_at_the_character():
    for text, position in (("1 +", 3), ("1 + *", 4), ("12 34", 3), ("(1", 2), ("1)", 1), ("é", 0)):
        with pytest.raises(ExpressionError) as caught:
            parse(text)
        assert caught.value.position == position, text
