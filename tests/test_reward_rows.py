"""From a reward function to rows of samples and their figures: what is checked before, and what any reward gives."""

import json
import math

import pytest
from configurations import compose, options
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import open_dict

from data_prep.cli import UserError
from verl_recipes.measure.batch import component_metrics, scored
from verl_recipes.measure.comparison import compare
from verl_recipes.measure.evaluation import measure, summarize
from verl_recipes.measure.problems import by_problem
from verl_recipes.reporting.run import evaluation_figures
from verl_recipes.run.reward import check_reward

finite = st.floats(-10, 10, allow_nan=False)


# --- before the start ------------------------------------------------------------------------------------------------


def refusal(path="pkg://reward_score.countdown", name="compute_score", **reward_kwargs):
    """The line that refuses a reward function, or none."""
    cfg = compose("train")
    with open_dict(cfg):
        function = {"path": str(path), "name": name, "reward_kwargs": reward_kwargs}
        cfg.reward.custom_reward_function = function
    try:
        check_reward(cfg)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "count"}, "there is no reward profile 'count', only countdown,"),
        ({"weights": {"repitition": -0.5}}, "the reward has no component repitition; it has format, acc"),
        ({"weights": {"repetition": "-0.5x"}}, "the weight of repetition is a number"),
        ({"subset": "yes"}, "subset is true or false"),
        ({"profil": "countdown"}, "the reward has no option profil"),
    ],
)
@pytest.mark.parametrize("module", ["countdown", "random_control"])
def test_a_wrong_option_of_the_reward_is_refused_before_the_start(module, options, message):
    line = refusal(f"pkg://reward_score.{module}", **options)
    assert message in line
    assert "\n" not in line


def test_a_wrong_seed_of_the_control_is_refused():
    assert "seed is an integer" in refusal("pkg://reward_score.random_control", seed="abc")


@pytest.mark.slow
@pytest.mark.parametrize("reward", options("reward"))
def test_a_shipped_reward_passes_and_the_controls_seed_is_the_runs(reward):
    cfg = compose("train", f"reward={reward}")
    cfg.seed = 7
    check_reward(cfg)
    if reward == "random":
        assert cfg.reward.custom_reward_function.reward_kwargs.seed == 7


@pytest.mark.slow
def test_a_reward_function_of_the_users_own_is_loaded_as_verl_loads_it(tmp_path):
    file = tmp_path / "my reward.py"
    file.write_text("def score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n", "utf-8")
    assert refusal(file, "score") is None
    assert refusal(f"file://{file}", "score") is None
    assert "has no such function" in refusal(file, "scores")
    assert "unexpected keyword argument 'profile'" in refusal(file, "score", profile="countdown")
    assert "No such file" in refusal(tmp_path / "no.py")
    assert "cannot be loaded" in refusal(tmp_path)
    assert "No module named 'no_such_package'" in refusal("pkg://no_such_package.reward")
    file.write_text("1 / 0\n", "utf-8")
    assert "ZeroDivisionError" in refusal(file, "score")
    file.write_text("def score(:\n", "utf-8")
    assert "SyntaxError" in refusal(file, "score")


@pytest.mark.slow
def test_options_can_be_left_out_and_not_set_to_null():
    cfg = compose("train", "~reward.custom_reward_function.reward_kwargs")
    check_reward(cfg)
    cfg = compose("train", "reward.custom_reward_function.reward_kwargs=null")
    with pytest.raises(UserError, match=r"add ~reward\.custom_reward_function\.reward_kwargs"):
        check_reward(cfg)


# --- what a row says -------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from(["score", "acc", "format", "own"]), st.floats(0, 1)), finite)
def test_the_score_is_what_was_trained_on_and_acc_is_always_there(verdict, trained_on):
    row = scored(verdict, trained_on)
    assert row["score"] == pytest.approx(trained_on, abs=1e-6)
    assert scored(verdict | {"reward_score": 5.0}, trained_on) == row
    assert row["reward_score"] == verdict.get("score", verdict.get("acc", trained_on))
    assert 0 <= row["acc"] <= 1
    assert {name: row[name] for name in ("format", "own") if name in verdict} == {
        name: verdict[name] for name in ("format", "own") if name in verdict
    }
    if {"acc", "score"} <= verdict.keys():
        assert row["acc"] == verdict["acc"]


@pytest.mark.parametrize(("returned", "acc"), [(1.0, 1.0), (2, 1.0), (0.1, 0.0), (0, 0.0), (-1.0, 0.0), (True, 1.0)])
def test_without_acc_a_response_is_right_if_its_score_is_1_or_more(returned, acc):
    for verdict in ({"acc": returned}, {"score": returned}):  # verl's extra info of a number, and of a dictionary
        assert scored(verdict, float(returned))["acc"] == acc
    shaped = scored({"acc": returned, "overlong_reward": -1.0}, returned - 1.0)
    assert (shaped["acc"], shaped["score"]) == (acc, returned - 1.0)


@pytest.mark.parametrize("acc", [2.0, -1.0, float("nan")])
def test_an_acc_outside_0_to_1_is_an_error(acc):
    with pytest.raises(ValueError, match="from 0 to 1"):
        scored({"score": 1.0, "acc": acc}, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["score", "acc"])
def test_a_reward_that_is_not_finite_is_an_error(name, value):
    with pytest.raises(ValueError, match="must be a finite number"):
        scored({name: value}, value)


def rows_of(verdicts):
    """Two problems with two samples each, scored like this."""
    return [
        {
            "prompt_id": str(i // 2),
            "prompt": f"problem {i // 2}",
            "response": f"response {i}",
            "ground_truth": {"numbers": [1 + i // 2, 2], "target": 3 + i // 2},
            "data_source": "countdown",
            "extra_info": {"split": "test", "index": i // 2},
            "response_tokens": 10,
            "truncated": False,
        }
        | scored(verdict, float(verdict.get("score", verdict.get("acc", 0.0))))
        for i, verdict in enumerate(verdicts)
    ]


@pytest.mark.parametrize("kind", ["a number", "a dictionary without acc", "with acc"])
def test_a_reward_of_the_users_own_has_metrics_a_summary_an_evaluation_and_a_report(kind):
    def verdict(value):
        if kind == "a number":
            return {"acc": value}
        return {"score": value, "brevity": 0.5} | ({"acc": float(value == 1)} if kind == "with acc" else {})

    rows = rows_of([verdict(value) for value in (1.0, 0.1, 0.0, 0.0)])
    assert json.loads(json.dumps(rows)) == rows
    assert component_metrics(rows)["reward/acc"] == 0.25
    summary = summarize(rows)
    assert (summary["mean@2"], summary["pass@2"]) == (0.25, 0.5)
    measured = measure(rows)
    assert measured["figures"]["mean@2"][0] == 0.25
    assert measured["reasons"] == {}
    assert "format" not in measured["figures"] | summary
    assert compare(rows, rows)["difference"][0] == 0
    assert set(evaluation_figures(by_problem(rows))["mean@2"].values()) == {0.5, 0.0}
