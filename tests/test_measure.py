"""Figures of samples: which belong to one problem, pass@k, intervals, the paired test, and what a summary says."""

import random
import subprocess
import sys
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import CONFIGS, UserError
from reward_score.figures import pass_at_k
from reward_score.grammar import REASONS
from verl_recipes.measure.comparison import compare, difference_of
from verl_recipes.measure.evaluation import majority, measure, summarize, what_is_missing
from verl_recipes.measure.intervals import figure
from verl_recipes.measure.problems import by_problem, problem_key
from verl_recipes.reporting.run import evaluation_figures

ROOT = CONFIGS.parent


def sample(problem, right, response="</think><answer>1</answer>", **others):
    """A row of samples/ on the problem of that number."""
    return {
        "ground_truth": {"numbers": [1, 2, problem + 3], "target": problem + 6},
        "response": response,
        "response_tokens": len(response),
        "score": 0.5 * right,
        "acc": float(right),
        "format": 1.0,
        "truncated": False,
        "reason": "right" if right else "wrong_value",
    } | others


def lines(sizes):
    """For one to five problems, which of their samples are right."""
    line = sizes.flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n))
    return st.lists(line, min_size=1, max_size=5)


def test_a_runs_figures_are_of_its_problems_in_distribution():
    rows, far = rows_of([[True, False], [False, False]]), {"extra_info": {"split": "ood_tv"}}
    figures = summarize([*rows, *(row | far for row in rows_of([[True, True]] * 2))])
    assert figures == summarize(rows)
    assert summarize([row | far for row in rows]) == figures  # if there are no others


def test_equations_tried_are_counted_in_the_same_samples_wherever_they_are_shown():
    """In the first eight of a problem, as a long response takes time."""
    rows = [sample(0, True, "\n".join(["1+2=3"] * tried) + "</think><answer>1</answer>") for tried in range(16)]
    [on_the_page] = evaluation_figures(by_problem(rows))["candidates"].values()
    assert summarize(rows)["candidates"] == measure(rows)["figures"]["candidates"][0] == on_the_page == 3.5


equal = st.integers(1, 5).flatmap(lambda n: lines(st.just(n)))
ragged = lines(st.integers(1, 5))


def rows_of(matrix):
    return [sample(problem, right) for problem, line in enumerate(matrix) for right in line]


def drawn(line, k):
    """The share of draws of k samples with a right one."""
    return np.mean([any(draw) for draw in combinations(line, k)])


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, data):
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, correct, k) == pytest.approx(drawn([True] * correct + [False] * (n - correct), k))


@given(equal)
@settings(max_examples=25)
def test_pass_at_k_and_mean_are_those_of_a_direct_enumeration(matrix):
    n = len(matrix[0])
    figures = measure(rows_of(matrix))["figures"]
    assert figures[f"mean@{n}"][0] == pytest.approx(np.mean(matrix))
    for k in range(1, n + 1):
        assert figures[f"pass@{k}"][0] == pytest.approx(np.mean([drawn(line, k) for line in matrix]))


@given(ragged, st.randoms())
@settings(max_examples=25)
def test_summary_report_evaluation_and_comparison_agree_on_unequal_numbers_of_samples_in_any_order(matrix, shuffled):
    """Each problem has its own n; k goes up to the least of them."""
    rows, n = rows_of(matrix), min(map(len, matrix))
    shuffled.shuffle(rows)
    mean = np.mean([np.mean(line) for line in matrix])
    chance = np.mean([drawn(line, n) for line in matrix])
    everywhere = [summarize(rows)]
    everywhere.append({name: value[0] for name, value in measure(rows)["figures"].items()})
    everywhere.append(
        {name: np.mean(list(each.values())) for name, each in evaluation_figures(by_problem(rows)).items()}
    )
    for figures in everywhere:
        assert figures[f"mean@{n}"] == pytest.approx(mean)
        if n > 1 or "pass@1" in figures:
            assert figures[f"pass@{n}"] == pytest.approx(chance)
        assert f"pass@{n + 1}" not in figures
    compared = compare(rows, rows_of(matrix))
    assert compared["first"][0] == pytest.approx(mean)
    assert (compared["problems"], compared["difference"][0], compared["p"]) == (len(matrix), 0, 1)


def test_a_problem_is_the_same_in_another_order_prompt_and_place():
    rows = [sample(0, True, prompt="Make it.", extra_info={"index": 0}), sample(0, False, prompt="凑", prompt_id="b")]
    rows[1] |= {"ground_truth": {"numbers": [3, 1, 2], "target": 6}, "extra_info": {"index": 7}}
    assert len(by_problem(rows)) == 1
    other = sample(0, True, ground_truth={"numbers": [1, 2, 3], "target": 7})
    assert problem_key(other) != problem_key(rows[0])


def test_a_problem_that_a_test_set_holds_twice_is_one_problem_with_twice_the_samples():
    twice = [sample(0, right, extra_info={"index": index}) for index in (0, 1) for right in (True, False)]
    once = [sample(1, right, extra_info={"index": 2}) for right in (False, False)]
    figures = summarize([*twice, *once])
    assert (figures["problems"], figures["mean@2"]) == (2, 0.25)
    assert figures["pass@2"] == pytest.approx((1 - 1 / 6) / 2)
    assert measure([*twice, *once])["figures"]["pass@2"][0] == pytest.approx(figures["pass@2"])


@pytest.mark.parametrize("name", ["set", "data_source"])
def test_a_problem_of_two_test_sets_is_measured_in_each(name):
    rows = [sample(0, True, **{name: "ood_a"}), sample(0, False, **{name: "ood_b"}), sample(1, True, **{name: "ood_b"})]
    figures = measure(rows)
    assert figures["problems"] == 3
    if name == "set":
        by_set = figures["by"]["set"]
        assert {key: (each["problems"], each["mean@1"][0]) for key, each in by_set.items()} == {
            "ood_a": (1, 1),
            "ood_b": (2, 0.5),
        }


def test_files_measured_together_give_what_one_file_gives():
    rows = [sample(problem, (problem + i) % 3 == 0) for problem in range(5) for i in range(4)]
    parts = [rows[0::3], rows[1::3], rows[2::3]]
    assert summarize([row for part in parts for row in part]) == pytest.approx(summarize(rows))


def test_a_problem_of_another_task_is_known_by_its_prompt_and_has_no_kinds_of_countdown():
    rows = [sample(0, i == 0, ground_truth="blue", prompt=prompt) for prompt in "ab" for i in range(2)]
    figures = measure(rows)
    assert (figures["problems"], figures["figures"]["pass@2"][0]) == (2, 1)
    assert figures["by"].keys() == {"set", "distribution"}
    assert "candidates" not in figures["figures"]


@pytest.mark.parametrize(("numbers", "target"), [([1] * 9, 9), ([0, 5], 5), ([-3, 5], 2), ([5], 5), ([2, 3], 10**12)])
def test_a_problem_that_the_solver_does_not_take_is_measured_too(numbers, target):
    rows = [sample(0, True), sample(0, True, ground_truth={"numbers": numbers, "target": target})]
    figures = measure(rows)
    assert (figures["problems"], figures["figures"]["mean@1"][0]) == (2, 1)
    assert figures["by"]["path"]["integers do"]["problems"] == 1


def test_a_reward_without_a_verdict_gives_figures_without_accuracy_and_says_so():
    rows = [sample(0, i) for i in range(3)]
    for row in rows:
        del row["acc"], row["format"], row["reason"]
    assert summarize(rows).keys() == {"problems", "score", "truncated", "response_tokens", "candidates"}
    assert summarize(rows)["score"] == 0.5
    figures = measure(rows, greedy=rows[:1])
    assert figures["figures"]["score"][0] == 0.5
    assert figures["reasons"] == {}
    assert [line.split("`")[1] for line in what_is_missing(rows)] == ["acc", "format", "reason"]
    assert what_is_missing([sample(0, True)]) == []
    with pytest.raises(UserError, match="without `acc`"):
        compare(rows, rows)


def test_nothing_is_measured_of_no_samples():
    assert summarize([]) == {"problems": 0}
    assert what_is_missing([]) == []
    with pytest.raises(UserError, match="no samples"):
        measure([])


def test_summary_means_over_samples_and_over_problems():
    response = "11+18=29,29-25=4 no\n18-11=7,7*25=175 yes</think>"
    truths = {"a": {"numbers": [11, 18, 25], "target": 175}, "b": {"numbers": [25, 18, 11], "target": 4}}
    given = (("a", 1.0), ("a", 0.0), ("b", 0.0), ("b", 0.0))
    figures = summarize([sample(0, acc, response, ground_truth=truths[name]) for name, acc in given])
    assert (figures["problems"], figures["mean@2"], figures["pass@2"], figures["candidates"]) == (2, 0.25, 0.5, 2)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=6))
def test_a_majority_is_the_most_frequent_answer_whatever_the_order(votes):
    rows = [{"response": f"</think><answer>{letter} </answer>", "acc": letter == "a"} for letter, _ in votes]
    counts = {letter: sum(letter == other for other, _ in votes) for letter, _ in votes}
    most = [letter for letter in counts if counts[letter] == max(counts.values())]
    assert majority(rows) == pytest.approx(("a" in most) / len(most))
    assert majority(sorted(rows, key=str)) == majority(rows)
    assert majority([{"response": "no", "acc": 0.0}]) == 0


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["12+3", "12 + 3", "1 2+3", "1-2", "1-2"], 0.5),  # "1 2+3" is no vote for 12+3
        (["12+3", "1 2+3", "1 2+3"], 0),
        (["(12+3)", "12+(3)", "12-3"], 1),
        (["1+2 3", "12+3"], 0.5),
    ],
)
def test_an_answer_is_its_expression_and_not_its_characters(texts, expected):
    right = {"12+3", "12 + 3", "(12+3)", "12+(3)"}
    rows = [{"response": f"</think><answer>{text}</answer>", "acc": float(text in right)} for text in texts]
    random.Random(0).shuffle(rows)
    assert majority(rows) == expected


def test_an_answer_within_the_thought_votes_if_it_was_scored():
    rows = [{"response": f"<answer>{text}</answer>", "acc": float(text == "1+2")} for text in ("1+2", "1+2", "2-1")]
    assert majority(rows) == 0
    assert majority([row | {"reason": "right" if row["acc"] else "wrong_value"} for row in rows]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("problems", [64, 256])
@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize(("a", "b"), [(0.6, 2.4), (3, 3), (8, 0.5), (0.05, 5)], ids=["base", "middle", "high", "low"])
def test_intervals_of_shares_cover_the_truth_at_their_rate(a, b, k, problems):
    """Problems whose difficulty follows Beta(a, b), 8 samples of each, 500 evaluations; 95% but for Monte Carlo."""
    rng = np.random.default_rng(k)
    truth = np.mean(1 - (1 - rng.beta(a, b, 10**6)) ** k)
    chance = np.array([pass_at_k(8, right, k) for right in range(9)])
    covered = 0
    for _ in range(500):
        _, low, high = figure(chance[rng.binomial(8, rng.beta(a, b, problems))])
        covered += low <= truth <= high
    assert covered / 500 >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 500)


def test_intervals_of_lengths_and_differences_cover_the_truth_at_their_rate():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        value, low, high = figure(rng.gamma(4, 25, 64), share=False)
        assert low < value < high
        covered += low <= 100 <= high
    assert abs(covered / 1000 - 0.95) <= 3 * np.sqrt(0.95 * 0.05 / 1000)


@pytest.mark.parametrize(("one", "other", "n", "problems"), [(0, 0.004, 8, 64), (0, 0.03, 1, 64), (1, 0.95, 1, 32)])
def test_intervals_of_differences_cover_the_truth_where_few_problems_differ(one, other, n, problems):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        a, b = (rng.binomial(n, share, problems) / n for share in (one, other))
        _, low, high = difference_of(b - a)
        covered += low <= other - one <= high
    assert covered / 500 >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 500)


def test_few_problems_have_wide_intervals():
    assert figure([1.0]) == [1.0, 0.0, 1.0]
    value, low, high = figure([1.0] * 10)
    assert (value, high) == (1.0, 1.0)
    assert 0.5 < low < 0.8


def test_a_share_outside_0_to_1_has_a_t_interval():
    assert figure([0.0, 2.0, 4.0]) == figure([0.0, 2.0, 4.0], share=False)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=7))
@settings(max_examples=25)
def test_the_paired_test_is_that_of_all_flips_of_signs(pairs):
    rows = [[sample(i, right < pair[side]) for i, pair in enumerate(pairs) for right in range(4)] for side in (0, 1)]
    result = compare(*rows)
    differences = np.array([b - a for a, b in pairs]) / 4
    flips = np.array([np.dot(signs, differences) for signs in product([-1, 1], repeat=len(pairs))])
    tails = [np.mean(flips >= differences.sum() - 1e-9), np.mean(flips <= differences.sum() + 1e-9)]
    assert result["difference"][0] == pytest.approx(differences.mean())
    assert result["p"] == pytest.approx(min(1, 2 * min(tails)))
    assert (result["better"], result["worse"]) == ((differences > 0).sum(), (differences < 0).sum())


def test_what_was_measured_on_other_problems_is_not_compared():
    with pytest.raises(UserError, match="not measured on the same problems: 2 and 2, 1 in common"):
        compare([sample(0, True), sample(1, True)], [sample(1, True), sample(2, True)])


def test_main_figures_are_in_distribution_and_kinds_show_the_rest():
    easy = [sample(0, True, set="test"), sample(1, False, set="test", reason="syntax")]
    hard = [sample(0, False, set="ood_x", ground_truth={"numbers": [3, 3, 8, 8], "target": 24})]
    figures = measure([*easy, *hard], greedy=[sample(0, True, set="test"), sample(1, True, set="test")])
    assert (figures["problems"], figures["figures"]["mean@1"][0], figures["figures"]["greedy"][0]) == (2, 0.5, 1.0)
    assert figures["by"]["distribution"]["out"]["mean@1"][0] == 0
    assert figures["by"]["set"].keys() == {"test", "ood_x"}
    assert figures["by"]["numbers"]["4"]["problems"] == 1
    assert figures["by"]["path"] == {
        "fraction needed": figures["by"]["set"]["ood_x"],
        "integers do": figures["by"]["set"]["test"],
    }
    assert figures["by"]["operators"]["* or / needed"]["problems"] == 1
    assert sum(share[0] for share in figures["reasons"].values()) == pytest.approx(1)
    assert figures["reasons"].keys() == {"right", *REASONS}


@pytest.mark.slow
def test_what_a_command_imports_is_loaded_in_a_moment():
    """scipy, matplotlib and templates wait until something is computed, drawn or written."""
    modules = "measure.comparison, verl_recipes.measure.evaluation, verl_recipes.report"
    heavy = ["scipy", "matplotlib", "jinja2", "pandas", "pyarrow", "torch"]
    code = f"import sys, verl_recipes.{modules}; print(sorted(set({heavy}) & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert result.stdout == "[]\n"
