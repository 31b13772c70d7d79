"""The pages of several models and runs: a ladder's three rungs, a warm start, and the seeds of a recipe."""

import json
import re
import sys
from itertools import pairwise

import pytest
from test_reporting import make_run, run_of, sample, turned, write_lines, write_samples

from data_prep.cli import UserError
from verl_recipes import report
from verl_recipes.reporting.charts import charts
from verl_recipes.reporting.page import PAGE_BYTES, about, write_report
from verl_recipes.reporting.run import Run, cell
from verl_recipes.reporting.story import example, gain_of, stories, story
from verl_recipes.run.folder import RunFolder

RUNGS = ["base model", "after the warm start", "after reinforcement learning"]


def make_warm_start(folder, losses=((10, 6.5), (20, 3.7))):
    """A folder as a warm start leaves it."""
    folder.mkdir(parents=True)
    lines = [{"step": step, "data": {"train/loss": 7 - step / 4}} for step in range(1, 21)]
    for step, loss in losses:
        lines[step - 1]["data"]["val/loss"] = loss
    write_lines(folder / "metrics.jsonl", lines)
    settings = {
        "name": folder.name,
        "run_dir": str(folder),
        "seed": 0,
        "trainer": {"device": "cpu", "n_gpus_per_node": 2},
    }
    settings |= {"sft": {"traces": str(folder / "traces"), "steps": 500, "lr": 1e-5, "batch": 8}}
    settings |= {"actor_rollout_ref": {"model": {"path": "models/base"}}}
    (folder / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    write_lines(folder / "traces" / "manifest.json", [{"traces": 4001}])
    (folder / "summary.json").write_text(json.dumps({"steps": 20, "seconds": {"total": 60.0}}), encoding="utf-8")
    write_lines(
        folder / "starts.jsonl", [{"event": "began", "time": 1e9, "command": "python -m verl_recipes.warm_start"}]
    )
    RunFolder(folder).write_mark("warm_start")
    return folder


def make_evaluation(folder, model, right, problems=100):
    """An evaluation in which this many of the problems are answered right, all of four samples or none."""
    rows = [
        sample(0, problem, i) | {"set": "test", "acc": float(problem < right), "reason": "right"}
        for problem in range(problems)
        for i in range(4)
    ]
    write_samples(folder, "validation", 0, rows)
    (folder / "summary.json").write_text(json.dumps({"model": str(model)}), encoding="utf-8")
    RunFolder(folder).write_mark("evaluation")
    return folder


def make_ladder(root, right=(17, 40, 70)):
    """A run from a warm start, and the evaluations of its three models."""
    warm = make_warm_start(root / "ladder-warm")
    run = make_run(root / "ladder", steps=2, warm_start=str(warm))
    rungs = zip(("base", "warm", "trained"), ("models/base", warm, run), right, strict=True)
    return run, [make_evaluation(root / "evaluations" / f"ladder-{name}", *about) for name, *about in rungs]


def test_a_ladder_has_a_column_a_rung_the_gain_of_each_over_the_one_before_and_a_problem_that_all_answered(tmp_path):
    run, rungs = make_ladder(tmp_path)
    read = Run(run, PAGE_BYTES, rungs)
    assert read.called == RUNGS
    rows = {row[0]: [cell.split(" ")[0] for cell in row[1:]] for row in read.headline}
    assert rows["mean@4"] == ["17.0", "40.0", "70.0", "+23.0", "+30.0"]
    assert {"pass@4", "truncated", "response tokens", "verification", "backtracking"} <= rows.keys()
    assert all("to" in cell for row in read.headline for cell in row[1:])
    shown = example(read)
    assert [side["whose"] for side in shown["sides"]] == RUNGS
    assert [shown["sides"][i]["right"] for i in (0, -1)] == [False, True]
    assert [line for line in read.missing if "compared" in line] == []


@pytest.mark.parametrize(
    ("right", "sentence"),
    [
        ((17, 40, 70), "From 17 to 40 of 100 test responses right after the warm start, then to 70 after rein"),
        ((17, 18, 70), "From 17 to 18 of 100 test responses right after the warm start (no difference that the test"),
        (
            (40, 17, 70),
            "From 40 to 17 of 100 test responses right after the warm start (the model got worse), then to 70",
        ),
        ((17, 40, 41), "From 17 to 40 of 100 test responses right after the warm start, then to 41 after rein"),
    ],
)
def test_the_first_sentence_of_a_ladder_tells_of_every_rung_and_how_sure_each_is(tmp_path, right, sentence):
    run, rungs = make_ladder(tmp_path, right)
    (said, *_), sure = story(Run(run, PAGE_BYTES, rungs))
    assert said.startswith(sentence)
    assert said.count("no difference") == sum(abs(other - one) == 1 for one, other in pairwise(right))
    interval = r"[+-]\d+ to [+-]\d+"
    each = rf"{interval} after the warm start, {interval} after reinforcement learning"
    assert re.fullmatch(rf"95% interval of the gain: {each}, over 100 problems\.", sure)


def test_a_model_that_the_run_does_not_know_is_called_by_its_path_and_a_warm_start_has_its_own_two(tmp_path):
    run, rungs = make_ladder(tmp_path)
    other = make_evaluation(tmp_path / "other", "models/other", 40)
    assert Run(run, PAGE_BYTES, [other, rungs[2]]).called == ["with models/other", RUNGS[2]]
    warm = Run(tmp_path / "ladder-warm", PAGE_BYTES, rungs[:2])
    assert warm.called == RUNGS[:2]
    assert story(warm)[0][0] == "From 17 to 40 of 100 test responses right after the warm start."


def test_evaluations_at_different_temperatures_are_called_so(tmp_path):
    run, rungs = make_ladder(tmp_path)
    for temperature, rung in enumerate(rungs):
        summary = json.loads((rung / "summary.json").read_text("utf-8"))
        (rung / "summary.json").write_text(json.dumps(summary | {"temperature": temperature}), encoding="utf-8")
    assert Run(run, PAGE_BYTES, rungs[:2]).called == [f"{each} (temperature {i})" for i, each in enumerate(RUNGS[:2])]


def test_an_evaluation_counts_problems_in_distribution_alone(tmp_path):
    run, rungs = make_ladder(tmp_path)
    for each in rungs:
        rows = [sample(0, problem, i) | {"set": "test"} for problem in range(3) for i in range(2)]
        rows += [sample(0, problem, i) | {"set": "ood_five", "acc": 1.0} for problem in range(9) for i in range(2)]
        write_samples(each, "validation", 0, rows)
    assert [len(groups) for groups in Run(run, PAGE_BYTES, rungs).evaluations] == [3, 3, 3]


@pytest.mark.slow
def test_the_command_writes_the_ladders_page_beside_the_runs_own(tmp_path, monkeypatch, capsys):
    run, rungs = make_ladder(tmp_path)
    (run / "report.html").write_text("the run's own")
    monkeypatch.setattr(sys, "argv", ["report", *map(str, [run, *rungs])])
    report.main()
    assert capsys.readouterr().out.strip() == str(run / "ladder.html")
    assert (run / "report.html").read_text() == "the run's own"
    page = (run / "ladder.html").read_text("utf-8")
    for name in [*RUNGS, "gain by the warm start", "gain by reinforcement learning"]:
        assert f'<th scope="col">{name}<' in page
    assert "Loss of the warm start" in page


def unfinished(run, rungs):
    (rungs[1] / "summary.json").unlink()
    return [run, *rungs]


def of_other_problems(run, rungs):
    make_evaluation(rungs[2], "models/base", 3, problems=50)
    return [run, *rungs]


def one_alone(run, rungs):
    return [run, rungs[0]]


def with_two_runs(run, rungs):
    return [run, make_run(run.parent / "other", steps=1), *rungs, f"out={run.parent}/out.html"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unfinished, "ladder-warm holds no finished evaluation"),
        (of_other_problems, "not measured on the same problems"),
        (one_alone, "compared with nothing"),
        (with_two_runs, "the page of one run"),
    ],
)
def test_evaluations_that_cannot_be_compared_are_refused_in_one_line(tmp_path, monkeypatch, spoil, said):
    run, rungs = make_ladder(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", *map(str, spoil(run, rungs))])
    with pytest.raises(UserError, match=said):
        report.main()


@pytest.mark.slow
def test_a_run_from_a_warm_start_shows_its_loss_and_says_so_if_it_is_gone(tmp_path):
    run, _ = make_ladder(tmp_path)
    read = run_of(run)
    assert read.called == ["after the warm start", "after step 2"]
    assert read.warm_curves["val/loss"] == {10: 6.5, 20: 3.7}
    assert "Loss of the warm start" in write_report([run], run / "report.html").read_text("utf-8")
    (tmp_path / "ladder-warm" / "metrics.jsonl").unlink()
    assert any(f"no metrics of the warm start in {tmp_path}" in line for line in run_of(run).missing)


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([(10, 6.5), (20, 3.7)], "held out was 6.5 at step 10, and 3.7 at step 20, which was kept."),
        ([(10, 3.5), (20, 3.7)], "held out was 3.5 at step 10, and no less later."),
        ([], "Nothing has been measured yet."),
    ],
)
def test_a_warm_start_has_a_page_of_its_loss_that_misses_nothing(tmp_path, losses, sentence):
    warm = make_warm_start(tmp_path / "warm", losses)
    read = run_of(warm)
    assert (read.state, read.missing) == ("complete", [])
    assert story(read)[0][0].endswith(sentence)
    page = write_report([warm], warm / "report.html").read_text("utf-8")
    assert re.findall(r'aria-labelledby="(\w+)" hidden', page) == [
        "headline",
        "curves",
        "behaviours",
        "samples",
        "pairs",
    ]
    assert "python -m verl_recipes.warm_start" in page
    assert "4001" in page


def seeds(root, *gained, **config):
    """Runs that differ by their seed, each from 20 of 100 right to so many more."""
    runs = [make_run(root / f"a-seed{seed}", steps=2, seed=seed, **config) for seed in range(len(gained))]
    return [turned(run, 20, 20 + gain) for run, gain in zip(runs, gained, strict=True)]


def test_the_page_of_seeds_begins_with_their_mean_and_an_interval_over_seeds(tmp_path):
    (said,), (sure,) = stories(seeds(tmp_path, 30, 34, 38))
    assert said == "From 20 to 54 of 100 test responses right, the mean of 3 seeds."
    assert (
        sure == "95% interval of the gain, over seeds: +24 to +44; the seeds gained +30 to +38."
    )  # 34 ± 4.303 · 4 / √3
    (said,), (sure,) = stories(seeds(tmp_path / "two", -5, 34))
    assert said.endswith("the mean of 2 seeds: no difference that the seeds can tell from chance.")


@pytest.mark.slow
def test_the_page_of_several_recipes_has_a_sentence_for_each(tmp_path):
    runs = [*seeds(tmp_path, 30, 34), *seeds(tmp_path / "b", 10, algorithm="rloo")]
    said, sure = stories(runs)
    assert said[0].startswith("a-seed0 and 1 more seed: from 20 to 52 of 100")
    assert said[1].startswith("a-seed0: from 20 to 30 of 100 test responses right after 2 steps of training")
    assert len(said) == len(sure) == 2
    many = [run for i in range(6) for run in seeds(tmp_path / f"many{i}", 10, algorithm=str(i))]
    assert stories(many)[0][-1] == "The table has 2 recipes more."


@pytest.mark.slow
def test_the_page_of_seeds_has_their_command_once(tmp_path):
    runs = [make_run(tmp_path / f"a-seed{seed}", steps=2, seed=seed) for seed in range(3)]
    command = "python -m verl_recipes.train 'seeds=[0,1]'"
    for run in runs[:2]:
        write_lines(run / "starts.jsonl", [{"event": "began", "time": 1e9, "command": command}])
    page = write_report(runs, tmp_path / "both.html").read_text("utf-8")
    repeat = page.partition('id="repeat"')[2].partition("</section>")[0]
    assert repeat.count("verl_recipes.train") == 1
    assert "a-seed0, a-seed1 were started by this command, which repeats them" in repeat
    assert "a-seed2: the command that was typed was not recorded" in repeat


def test_a_run_with_one_test_tells_of_all_its_test_sets_in_distribution(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    (run / "samples" / "validation" / "2.jsonl").unlink()
    rows = [sample(0, i, 0) | {"data_source": f"countdown/{i // 50}", "acc": float(i < 50)} for i in range(100)]
    far = {"data_source": "countdown/tv", "extra_info": {"split": "ood_tv"}, "acc": 0.0}
    write_samples(run, "validation", 0, [*rows, *(row | far for row in rows)])
    assert story(run_of(run))[0][0] == "Before training the model got 50 of 100 test responses right."


def test_an_evaluation_alone_is_not_of_a_model_before_training(tmp_path):
    read = run_of(make_evaluation(tmp_path / "evaluation", "runs/mine", 60))
    assert (story(read)[0], read.called) == (["The model got 60 of 100 test responses right."], ["the measured model"])
    assert "an evaluation" in about(read)


def test_a_page_of_several_tells_the_result_of_a_run_that_ended_early(tmp_path):
    runs = [*seeds(tmp_path, 30), *seeds(tmp_path / "b", 10, algorithm="rloo")]
    runs[0].summary, runs[0].planned = {"early_end": True, "steps": 2}, 9
    assert "From 20 to 50 of 100" in stories(runs)[0][0]
    runs[0].planned = 2  # the last planned test was the one too many
    assert "got no better" not in stories(runs)[0][0]


def test_what_is_said_of_a_line_names_its_run(tmp_path):
    runs = [make_run(tmp_path / name, steps=2, algorithm=name) for name in "ab"]
    path = runs[1] / "metrics.jsonl"
    path.write_text(path.read_text("utf-8").replace('clip_ratio": 0.1', 'clip_ratio": 0.0'), encoding="utf-8")
    cut = next(each for each in charts([run_of(run) for run in runs], []) if each["title"] == "Responses cut off")
    assert cut["said"] == ["cut off, b: 0 at every step"]


def test_two_checkpoints_of_a_run_have_two_names(tmp_path):
    run, _ = make_ladder(tmp_path)
    two = [make_evaluation(tmp_path / f"e{i}", run / "checkpoints" / f"global_step_{i}", 20 * i) for i in (1, 2)]
    assert len(set(Run(run, PAGE_BYTES, two).called)) == 2


def test_a_metric_that_was_no_number_is_missing(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text("utf-8").replace('grad_norm": 0.2', 'grad_norm": null'), encoding="utf-8")
    assert any(line.startswith("actor/grad_norm: no finite number at 2 steps") for line in run_of(run).missing)


def test_a_gain_near_0_says_on_which_side_of_it_its_interval_is():
    assert gain_of([0.003] * 999 + [0.0]) == ("", "+0.3 to +0.3")


def test_a_gain_at_two_problems_is_no_certainty_and_none_at_many_has_an_interval():
    assert gain_of([1.0, 1.0])[0] == "no difference that the test can tell from chance"
    assert cell([0.0] * 256, "mean@1", "+") == "+0.0 (-1.1 to +1.1)"
