"""What a report and the picture of a run are made from, and the command, without a browser."""

import fcntl
import json
import math
import re
import shutil
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cli import UserError
from verl_recipes import report, runs
from verl_recipes.measure.behaviours import BEHAVIOURS
from verl_recipes.reporting import watch as watching
from verl_recipes.reporting.charts import charts, recipe_of
from verl_recipes.reporting.draw import picture
from verl_recipes.reporting.listing import facts, listing
from verl_recipes.reporting.metrics import seconds_of
from verl_recipes.reporting.page import PAGE_BYTES, as_script_data, write_report
from verl_recipes.reporting.run import STEP_BYTES, Run, SampleFile, marked
from verl_recipes.reporting.story import example, story
from verl_recipes.reporting.terms import PAGES, terms
from verl_recipes.reporting.terms import page as glossary
from verl_recipes.run.folder import RunFolder, append_line, as_lines

THOUGHTS = ["11+18=29,29-25=4 no\n18-11=7,7*25=175 yes", "11*18=190,190-25=165 no", "先凑出7：18-11=7，7*25=175，对了"]


def sample(step, problem, i, response=None):
    right = (problem + i + step) % 3 == 0
    return {
        "step": step,
        "prompt_id": f"p{problem}",
        "prompt": "Make it.",
        "response": response or f"{THOUGHTS[(i + step) % 3]}</think>\n<answer> (18-11)*25 </answer>",
        "ground_truth": {"numbers": [11, 18, 25], "target": 170 + problem},
        "response_tokens": 30 + step,
        "truncated": i == 3,
        "score": float(right),
        "acc": float(right),
        "format": 1.0,
        "reason": "right" if right else "wrong_value",
    }


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_samples(run, split, step, rows):
    write_lines(run / "samples" / split / f"{step}.jsonl", rows)


def make_run(run, steps=6, seed=0, **config):
    """A folder as a run of so many steps leaves it; returns it."""
    run.mkdir(parents=True)
    metrics = [{"step": 0, "data": {"val-core/countdown/acc/mean@1": 0.2, "val-aux/countdown/score/mean@1": 0.3}}]
    for step in range(1, steps + 1):
        data = {"reward/score": step / 10 + seed / 100, "reward/acc": step / 10, "reward/format": 0.9}
        data |= {"reward/reason/wrong_value": 0.5, "response_length/mean": 30 + step, "response_length/clip_ratio": 0.1}
        data |= {"actor/kl_loss": 0.01 * step, "actor/entropy": 0.3, "actor/grad_norm": 0.2, "perf/throughput": 900.0}
        data |= {"reward/groups_without_signal": 0.2, "timing_s/step": 36.0, "timing_s/gen": 20.0}
        data |= {"training/rollout_actor_probs_pearson_corr": 0.9999}
        metrics.append({"step": step, "data": data})
        write_samples(run, "train", step, [sample(step, problem, i) for problem in range(4) for i in range(4)])
    metrics[-1]["data"] |= {"val-core/countdown/acc/mean@1": 0.5, "val-aux/countdown/score/mean@1": 0.6}
    for step in (0, steps):
        write_samples(run, "validation", step, [sample(step, problem, i) for problem in range(9) for i in range(4)])
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    trainer = {"n_gpus_per_node": 2, "nnodes": 1, "device": "cuda", "total_training_steps": steps}
    settings = {"name": run.name, "seed": seed, "run_dir": str(run), "trainer": trainer, "plan": {"price": [5, 7]}}
    (run / "config.yaml").write_text(json.dumps(settings | config), encoding="utf-8")  # JSON is YAML
    summary = {"versions": {"verl": "0.9.1"}, "git_commit": "abc", "seconds": {"total": 360.0}, "resumed_from": 0}
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return run


def test_of_very_many_steps_some_are_read_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("verl_recipes.reporting.run.READ_STEPS", 3)
    run = Run(make_run(tmp_path / "run", steps=10), PAGE_BYTES)
    assert sorted(run.training) == [1, 5, 10]
    assert "train samples of 10 steps: those of 3 were read" in run.missing
    assert not Run(tmp_path / "run", 0).training  # nothing is read


def test_a_long_chinese_response_has_room_on_the_page(tmp_path):
    run = Run(make_run(tmp_path / "run"), PAGE_BYTES)
    row = sample(1, 0, 0, "先算三加四" * 2000 + "</think>" + "再想一想" * 2000)
    assert list(run.fitting([row], SampleFile("train", 1, tmp_path), STEP_BYTES))


def killed(run):
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8")
    (run / "metrics.part.jsonl").write_text(lines[: len(lines) // 2], encoding="utf-8")
    (run / "metrics.jsonl").unlink()
    last = run / "samples" / "train" / "3.jsonl"
    last.write_bytes(last.read_bytes()[:-300] + b"\xe5\x87")


def without_validation(run):
    shutil.rmtree(run / "samples" / "validation")


def without_a_metric(run):
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    (run / "metrics.jsonl").write_text(
        text.replace("actor/grad_norm", "other").replace("actor/kl_loss", "another"), encoding="utf-8"
    )


def emptied(run):
    shutil.rmtree(run)
    run.mkdir()
    (run / "log.txt").write_text("", encoding="utf-8")  # by which it is still a run's


def broken(run):
    (run / "config.yaml").write_text("a: [b", encoding="utf-8")
    (run / "summary.json").write_text('{"versions": 3, "seconds": {"total": "long"}}', encoding="utf-8")
    (run / "metrics.jsonl").write_text('5\n{"step": 1}\n{"step": "x", "data": {}}\n' + "[" * 100_000, encoding="utf-8")


def run_of(folder):
    return Run(folder, PAGE_BYTES)


def test_gpus_that_only_generate_cost_as_well(tmp_path):
    trainer = {"n_gpus_per_node": 3, "nnodes": 1, "device": "cuda", "v1": {"trainer_mode": "separate_async"}}
    split = {"trainer": trainer, "actor_rollout_ref": {"rollout": {"n_gpus_per_node": 1, "nnodes": 1}}}
    assert run_of(make_run(tmp_path / "run", **split)).cost(None, None)["gpus"] == 4


def test_data_in_the_page_cannot_end_its_script():
    text = as_script_data({"</script>": ["<!--", float("nan"), "\u2028\ud800"]})
    assert "<" not in text
    assert text.isascii()
    assert json.loads(text) == {"</script>": ["<!--", None, "\u2028\ud800"]}


def config(name, seed, **others):
    """A resolved configuration as a run of that name has it."""
    trainer = {"experiment_name": name, "default_local_dir": f"runs/{name}/checkpoints"}
    trackers = {"mlflow": {"environment": {"MLFLOW_TRACKING_URI": f"sqlite:///runs/{name}/mlflow.db"}}}
    settings = {"name": name, "run_dir": f"runs/{name}", "seed": seed, "data": {"seed": seed}, "fresh": seed > 0}
    settings |= {"trainer": trainer, "trackers": trackers, "algorithm": {"adv_estimator": "grpo"}}
    return settings | {"actor": {"data_loader_seed": seed, "optim": {"lr": 1e-6}}} | others


@pytest.mark.parametrize(
    ("first", "second", "other"),
    [
        ("grpo", "rloo", {"algorithm": {"adv_estimator": "rloo"}}),
        ("a-1e-06", "a-1e-05", {"actor": {"data_loader_seed": 0, "optim": {"lr": 1e-5}}}),
        ("acc", "format", {"reward": {"path": "format"}}),
        ("a", "b", {"trainer": {"default_local_dir": "elsewhere/b"}}),
    ],
)
def test_runs_that_differ_in_what_they_are_named_after_are_no_seeds_of_one_recipe(first, second, other):
    """The reward of the first run is named `acc`."""
    reward = {"reward": {"path": "acc"}} if "reward" in other else {}
    assert recipe_of(config(first, 0, **reward)) == recipe_of(config("x/y", 1, **reward))
    assert recipe_of(config(first, 0, **reward)) != recipe_of(config(second, 1, **other))


texts = st.text("ab./", max_size=3)
leaf = st.integers(0, 3) | texts | st.booleans() | st.none() | st.lists(texts, max_size=2)
trees = st.recursive(leaf, lambda inner: st.dictionaries(st.sampled_from(["a", "b", "lr", "name"]), inner, max_size=3))


@given(trees, trees)
def test_two_configurations_are_of_one_recipe_only_if_every_other_key_is_equal(one, other):
    same = recipe_of(config("a", 0, more={"x": one})) == recipe_of(config("b", 1, more={"x": other}))
    assert same == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


def test_the_lines_of_a_chart_are_runs_and_bands_of_seeds(tmp_path):
    runs = [make_run(tmp_path / f"grpo-seed{seed}", steps=2, seed=seed, algorithm="grpo") for seed in range(2)]
    runs.append(make_run(tmp_path / "rloo-seed0", steps=2, algorithm="rloo"))
    runs += [make_run(tmp_path / place / "same", steps=2) for place in "ab"]
    for run in runs[-2:]:
        (run / "config.yaml").unlink()  # two folders of one name, of which nothing else is known
    lines = charts([run_of(run) for run in runs], [])[0]["lines"]
    assert [line["run"] for line in lines] == ["grpo-seed0 and 1 more seed", "rloo-seed0", "same", "same"]
    assert ["low" in line for line in lines] == [True, False, False, False]


def test_a_reward_without_a_verdict_has_a_report_that_says_so(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    for path in (run / "samples").rglob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        kept = [{key: row[key] for key in row.keys() - {"acc", "format", "reason"}} for row in rows]
        write_samples(run, path.parent.name, path.stem, kept)
    read = run_of(run)
    assert [row[0] for row in read.headline] == ["reward", "truncated", "response tokens", "candidates", *BEHAVIOURS]
    assert {sample["right"] for sample in read.samples} == {None}
    page = write_report([run], run / "report.html").read_text("utf-8")
    for name in ("acc", "format", "reason"):
        assert f"<li>no `{name}`: the reward does not say" in page


@pytest.mark.parametrize(
    ("response", "reason", "expected"),
    [
        ("1+1=3, no</think> so <answer>2</answer>.", "right", ["false", "thought", "rest", "answer", "rest"]),
        ("<answer>2</answer></think>", "no_answer", ["thought", "rest"]),
        ("1+1=2 <answer>2</answer></think>", "right", ["thought", "answer", "rest"]),  # the profile tinyzero
        ("never ends", "no_answer", ["thought"]),
    ],
)
def test_the_answer_that_was_scored_is_marked(response, reason, expected):
    parts = marked({"response": response, "reason": reason})
    assert "".join(text for _, text in parts) == response
    assert [kind for kind, _ in parts] == expected


def test_the_headline_is_right_for_samples_in_any_order_and_for_some_more_of_one_problem(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    rows = [sample(0, problem, i) | {"acc": float(i == 1)} for problem in range(2) for i in range(3)]
    rows.append(sample(0, 0, 1) | {"acc": 0.0})  # the first problem four times, one of them right
    write_samples(run, "validation", 0, reversed(rows))
    headline = {row[0]: row[1] for row in run_of(run).headline}
    assert headline["mean@3"].startswith(f"{100 * (1 / 4 + 1 / 3) / 2:.1f} ")
    assert headline["pass@3"].startswith(f"{100 * (3 / 4 + 1) / 2:.1f} ")


def test_problems_out_of_distribution_are_not_in_the_first_sentence(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    for step, right in ((0, 1), (2, 3)):
        rows = [sample(step, problem, 0) | {"acc": float(problem < right)} for problem in range(4)]
        far = {"data_source": "countdown/tv", "extra_info": {"split": "ood_tv"}, "acc": 0.0}
        write_samples(run, "validation", step, [*rows, *(row | far for row in rows)])
    sentences, _ = story(run_of(run))
    assert sentences[0].startswith("From 25 to 75 of 100 test responses right")
    assert len(run_of(run).tests) == 2  # the chart shows each


@pytest.mark.parametrize(
    ("total", "goodput", "expected"),
    [
        (22.0, {"share": 0.5, "steps": 30.0, "start": 14.0}, 44.0),  # of all starts
        (60.0, {"share": 0.5, "steps": 30.0, "start": 14.0}, 60.0),  # the command, with the export
        (-3600.0, {"share": 1.0, "steps": -10.0, "start": 0.0}, None),  # the clock was set back
        (22.0, {}, 22.0),
        (None, None, None),
    ],
)
def test_a_run_took_the_time_of_all_its_starts(total, goodput, expected):
    assert seconds_of({"seconds": {"total": total}, "goodput": goodput}) == expected


def test_a_checkpoint_cost_the_steps_up_to_it(tmp_path):
    run = run_of(make_run(tmp_path / "run", steps=4))
    run.curves["timing_s/step"], run.curves["timing_s/testing"] = {1: 10.0, 2: 20.0, 3: 40.0}, {2: 3.0, 4: 5.0}
    run.seconds = 100.0
    hours = [run.cost(until=until)["hours"] * 3600 / run.devices() for until in (2, 3, 4, math.inf)]
    assert hours == pytest.approx([33, 73, 100, 100])


def test_a_problem_of_two_test_sets_has_two_names_on_the_page(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    rows = [sample(0, problem, 0) | {"data_source": name} for problem, name in ((0, "a"), (0, "b"), (1, "b"))]
    write_samples(run, "validation", 0, rows)
    shown = {row["problem"] for row in run_of(run).samples if row["split"] == "validation" and row["step"] == 0}
    assert shown == {"[11, 18, 25] → 170 (test, a)", "[11, 18, 25] → 170 (test, b)", "[11, 18, 25] → 171 (test, b)"}


def turned(run, before, after):
    """Give a run two tests whose responses are right at these shares of its problems."""
    for step, right in ((0, before), (2, after)):
        rows = [sample(step, problem, 0) | {"acc": float(problem < right)} for problem in range(100)]
        write_samples(run, "validation", step, rows)
    return run_of(run)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (22, 58, "From 22 to 58 of 100 test responses right after 2 steps of training."),
        (50, 51, "From 50 to 51 of 100 test responses right after 2 steps of training: no difference"),
        (58, 22, "From 58 to 22 of 100 test responses right after 2 steps of training: the model got worse."),
        (40, 40, "40 of 100 test responses right after 2 steps of training: no difference"),
    ],
)
def test_the_first_sentence_says_what_the_tests_say_and_no_more(tmp_path, before, after, sentence):
    (said, *_), sure = story(turned(make_run(tmp_path / "run", steps=2), before, after))
    assert said.startswith(sentence)
    assert "over 100 problems" in sure


def test_the_shown_problem_became_right_if_one_did(tmp_path):
    shown = example(turned(make_run(tmp_path / "run", steps=2), 22, 58))
    assert shown["turned"]
    assert [side["right"] for side in shown["sides"]] == [False, True]
    assert 170 + 22 <= shown["target"] < 170 + 58
    assert not example(turned(make_run(tmp_path / "worse", steps=2), 58, 22))["turned"]


def test_a_run_that_was_killed_tells_how_far_it_came(tmp_path):
    run = make_run(tmp_path / "run", steps=4)
    killed(run)
    (run / "samples" / "validation" / "4.jsonl").unlink()
    sentences, sure = story(run_of(run))
    assert sentences[0] == "The run ended early: 1 of 4 steps are done."
    assert sentences[1].startswith("Before training the model got ")
    assert sure.startswith("95% interval of the test")
    assert [len(row) for row in run_of(run).headline] == [2] * len(run_of(run).headline)  # no gain, and no step twice


def test_what_is_rounding_or_nothing_or_one_point_is_said_and_not_drawn(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    lines = [json.loads(each) for each in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    for line in lines[1:]:
        line["data"] |= {"actor/kl_loss": -5e-9, "training/rollout_actor_probs_pearson_corr": 1 - 1.6e-12}
        line["data"] |= {"response_length/clip_ratio": 0.0, "actor/grad_norm": float("nan")}
    lines[2]["data"]["actor/grad_norm"] = 0.25
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = {chart["title"]: chart for chart in charts([run_of(run)], [])}
    said = {
        "KL divergence": "from the base model, in the loss: 0 at every step (below 0.000001, which is rounding)",
        "Disagreement of rollout engine and trainer": (
            "the probabilities of rollout engine and trainer correlate at 1 to within 2e-12, at every step"
        ),
        "Responses cut off": "cut off: 0 at every step",
        "Gradient norm": "policy: 0.25 at step 2, the only value",
    }
    for title, sentence in said.items():
        assert (found[title]["lines"], found[title]["said"]) == ([], [sentence])


def test_a_value_that_is_not_drawn_still_makes_a_line_worth_drawing(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    data = ({"response_length/clip_ratio": 0.9 * (step == 1000)} for step in range(1, 1502))
    write_lines(run / "metrics.jsonl", [{"step": step, "data": each} for step, each in enumerate(data, 1)])
    cut = next(chart for chart in charts([run_of(run)], []) if chart["title"] == "Responses cut off")
    assert 1000 not in cut["lines"][0]["x"]
    assert not cut["said"]


@pytest.mark.slow
def test_a_page_says_that_dynamic_sampling_dropped_groups_and_on_which_problems_each_run_was_tested(tmp_path):
    runs = [make_run(tmp_path / name, steps=2, data={"val_files": f"data/{name}/test.parquet"}) for name in "ab"]
    runs.append(make_run(tmp_path / "dapo", steps=2, algorithm={"filter_groups": {"enable": True}}))
    page, end = write_report(runs, tmp_path / "page.html").read_text("utf-8"), "Whole configuration of"
    assert page.index("data/a/test.parquet") < page.index("data/b/test.parquet") < page.index(end)
    assert "<li>dapo: groups that dynamic sampling dropped: training figures are of the others</li>" in page


def test_a_reader_sees_words_and_always_the_same_colours(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    whole = {each["label"]: each["colour"] for chart in charts([run_of(run)], []) for each in chart["lines"]}
    assert not {label for label in whole if re.search(r"[_/@]", label)}
    path = run / "metrics.jsonl"
    path.write_text(path.read_text("utf-8").replace("reward/acc", "x"), encoding="utf-8")
    fewer = {each["label"]: each["colour"] for chart in charts([run_of(run)], []) for each in chart["lines"]}
    assert set(whole) - set(fewer) == {"right"}
    assert fewer.items() <= whole.items()


@pytest.mark.slow
def test_without_matplotlib_a_page_lacks_its_pictures_alone_and_says_so_in_one_line(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "verl_recipes.reporting.draw", raising=False)
    page = write_report([run], run / "report.html").read_text("utf-8")
    assert page.count("matplotlib is not installed, so charts have a table and no picture") == 1
    assert "<svg" not in page
    assert "Table: Reward in training" in page


@pytest.mark.slow
def test_a_run_named_twice_is_one_run(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    page = write_report([run, tmp_path / "." / "run"], tmp_path / "out.html").read_text("utf-8")
    assert "<h1>run</h1>" in page


@pytest.mark.slow
def test_the_typed_command_is_what_repeats_a_run(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    lines = [
        {"event": "began", "time": 1e9, "command": f"python -m verl_recipes.train recipe=tiny seed={i}"} for i in "00"
    ]
    write_lines(run / "starts.jsonl", [line | {"machine": "2 × a CPU, 8 GiB of memory"} for line in lines])
    page = write_report([run], run / "report.html").read_text("utf-8")
    assert page.count("python -m verl_recipes.train recipe=tiny seed=0") == 1
    assert "main_ppo" not in page.partition('id="repeat"')[2].partition("</section>")[0]
    assert "6 min 0 s · 2 × a CPU, 8 GiB of memory" in page.replace("complete, ", "")


@pytest.mark.slow
def test_every_term_that_the_page_asks_for_is_explained(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    page = write_report([run], run / "report.html").read_text("utf-8")
    asked = set(re.findall(r'popovertarget="term-(\w*)"', page))
    assert asked <= terms("en").keys() == terms("zh").keys()


@pytest.mark.parametrize("language", PAGES)
def test_the_glossary_in_the_documents_is_that_of_the_page(language):
    assert PAGES[language].read_text("utf-8") == glossary(language)


def test_a_reward_that_is_a_number_is_not_listed_as_right_answers(tmp_path):
    (run := tmp_path / "run").mkdir()
    lines = [{"step": 0, "data": {"val-core/c/acc/mean@1": 1.4, "val-aux/c/reward/mean@1": 1.4}}]
    (run / "metrics.jsonl").write_text(as_lines(lines), encoding="utf-8")
    (run / "config.yaml").write_text("{}", encoding="utf-8")
    assert facts(run)["before"] is None


def test_one_measured_seed_has_no_mean(tmp_path):
    folders = [make_run(tmp_path / f"a-seed{seed}", steps=4, seed=seed, recipe_name="tiny") for seed in (0, 1)]
    assert len(listing(folders)["rows"]) == 3
    killed(folders[1])
    assert len(listing(folders)["rows"]) == 2


def test_runs_are_listed_with_their_figures_and_the_mean_of_seeds(monkeypatch, capsys, tmp_path):
    for seed, name in enumerate(["a-seed0", "below/a-seed1"]):
        run = make_run(tmp_path / name, steps=2, seed=seed, recipe_name="tiny")
        RunFolder(run).write_mark("run")
        figures = {"base": {"mean@4": 0.2, "candidates": 1.5}, "trained": {"mean@4": 0.5 + seed / 10, "candidates": 6}}
        (run / "summary.json").write_text(json.dumps(figures | {"seconds": {"total": 300.0}}), encoding="utf-8")
    killed(make_run(tmp_path / "b", steps=4))
    RunFolder(tmp_path / "b").write_mark("run")
    monkeypatch.setattr(sys, "argv", ["runs", f"folder={tmp_path}"])
    runs.main()
    header, *lines = (re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines())
    assert header[:5] == ["run", "recipe", "seed", "state", "steps"]
    assert [line[0] for line in lines] == ["a-seed0", "a-seed1", "mean of 2 seeds", "b"]
    assert lines[0][5:10] == ["20.0", "50.0", "+30.0", "1.5 to 6.0", "5 min 0 s"]
    assert lines[2][2:] == ["20.0 (20.0 to 20.0)", "55.0 (50.0 to 60.0)", "+35.0 (+30.0 to +40.0)"]
    assert "ended early" in lines[3]
    monkeypatch.setattr(sys, "argv", ["runs", "folder=nowhere"])
    with pytest.raises(UserError, match="there is no folder nowhere"):
        runs.main()


def listed(monkeypatch, capsys, folder):
    """What `python -m verl_recipes.runs` prints: the cells of each line by the run's name, and its lines on stderr."""
    monkeypatch.setattr(sys, "argv", ["runs", f"folder={folder}"])
    runs.main()
    out, err = capsys.readouterr()
    return {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in out.splitlines()[1:]}, err.splitlines()


def test_evaluations_and_warm_starts_are_not_listed_as_runs(monkeypatch, capsys, tmp_path):
    for kind in ("run", "evaluation", "warm_start"):
        RunFolder(make_run(tmp_path / kind, steps=1)).write_mark(kind)
    assert listed(monkeypatch, capsys, tmp_path)[0].keys() == {"run"}


def test_a_run_that_goes_on_past_its_first_end_is_not_complete_before_its_second(monkeypatch, capsys, tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    RunFolder(run).write_mark("run")
    summary = json.loads((run / "summary.json").read_text("utf-8")) | {"steps": 2, "trained": {"mean@4": 0.1}}
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert (run_of(run).state, run_of(run).cost()["basis"]) == ("ended early", "the steps that are in metrics.jsonl")
    with RunFolder(run).locked():
        cells = listed(monkeypatch, capsys, tmp_path)[0]["run"]
    assert cells[2:6] == ["goes on", "3 of 3", "20.0", "50.0"]  # the test of step 3, and not of the first end
    (run / "summary.json").write_text(json.dumps(summary | {"steps": 3}), encoding="utf-8")
    with RunFolder(run).locked():  # while the command makes its page
        assert run_of(run).state == "complete"


def no_text(run):
    (run / "config.yaml").write_text("name: 模型", encoding="utf-16")


def no_date(run):
    (run / "config.yaml").write_text("name: 2026-02-31", encoding="utf-8")


def no_settings_file(run):
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()


def no_metrics_file(run):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()


@pytest.mark.parametrize("damage", [broken, no_text, no_date, no_settings_file, no_metrics_file])
def test_a_run_that_cannot_be_read_is_named_in_one_line_and_the_others_are_listed(
    monkeypatch, capsys, tmp_path, damage
):
    for name in ("whole", "damaged"):
        RunFolder(make_run(tmp_path / name, steps=1)).write_mark("run")
    damage(tmp_path / "damaged")
    rows, lines = listed(monkeypatch, capsys, tmp_path)
    assert "complete" in rows["whole"]
    assert [str(tmp_path / "damaged") in line for line in lines] == [True]


def test_a_watched_page_is_made_while_its_run_works_and_once_more_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "EVERY", 0.01)
    run, made = make_run(tmp_path / "run", steps=2), []

    def make(refresh):
        made.append(refresh)
        if len(made) == 2:
            lock.close()  # the run ends
        append_line(run / "metrics.jsonl", {})  # the run does something

    with (run / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        watching.watch([run], make)
    assert made == [0.01, 0.01, 0]


def test_a_run_that_is_emptied_while_its_page_is_made_is_watched_on(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "EVERY", 0.01)
    run, made = RunFolder(make_run(tmp_path / "run", steps=2)), []
    run.write_mark("run")

    def make(refresh):
        file = next(run.samples.glob("train/*"), None)  # as a page lists files and then reads them
        if file:
            run.empty(print)
        made.append(file.read_text("utf-8") if file else refresh)
        lock.close()  # the run ends

    with (run.path / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        watching.watch([run.path], make)
    assert made == [0.01, 0]


@pytest.mark.slow
def test_a_browser_that_goes_and_a_page_that_is_gone_are_no_errors(tmp_path, capfd):
    page = tmp_path / "report.html"
    page.write_text("x" * 20_000_000, encoding="utf-8")
    server = watching.serve(page, 0)
    before = threading.active_count()
    with socket.create_connection(server.server_address) as browser:
        browser.sendall(b"GET / HTTP/1.0\r\n\r\n")
        browser.recv(1)
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as a closed tab does
    while threading.active_count() > before:
        time.sleep(0.01)
    page.unlink()
    with pytest.raises(urllib.error.HTTPError, match="503") as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/")
    assert f'content="{watching.EVERY}"' in caught.value.read().decode()  # so that the browser asks again
    server.shutdown()
    server.server_close()
    assert capfd.readouterr().err == ""


def test_a_page_is_served_to_this_machine_alone_and_nothing_else_is(tmp_path):
    page = tmp_path / "report.html"
    page.write_text("<h1>run</h1>", encoding="utf-8")
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    server = watching.serve(page, 0)
    address = f"http://127.0.0.1:{server.server_port}/"
    assert server.server_address[0] == "127.0.0.1"
    with urllib.request.urlopen(address) as answer:
        assert answer.read() == b"<h1>run</h1>"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{address}secret")
    with pytest.raises(UserError, match="port=0 takes a free one"):
        watching.serve(page, server.server_port)
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [None, killed, without_validation, without_a_metric, emptied, broken])
def test_curves_are_drawn_of_what_there_is(tmp_path, damage):
    run = make_run(tmp_path / "a[b]c[/d] $x$ 模型", steps=3)
    if damage in (killed, None):
        with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"step": 4, "data": {"reward/ac')
    if damage:
        damage(run)
    picture(RunFolder(run), f"{run.name}: mean@4 0.1 to 0.2 $\\frac$")
    assert (run / "curves.png").stat().st_size > 10_000


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run's folder"),
        (["nowhere"], "there is no run folder nowhere"),
        (["."], ". holds no run; python -m verl_recipes.runs folder=. lists those below it"),
        (["a", "b"], "out=FILE"),
        (["a", "prize=3"], "prize"),
        (["a", "price=much"], "price"),
        (["a", "price=true"], "price"),
        (["a", "price=-1"], "price"),
        (["a", "price=[1,2,3]"], "price"),
        (["a", "out="], "out"),
        (["a", "out=[b"], "out"),
        (["a", "port=70000"], "port"),
        (["a", "watch=perhaps"], "watch"),
        (["a", "out=/proc/x/page.html"], "/proc/x: No such file or directory; name another file"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, tmp_path, arguments, message):
    RunFolder(tmp_path / "a").write_mark("run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        call(monkeypatch, *arguments)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_no_run_folder(monkeypatch, capsys, option):
    call(monkeypatch, option)
    printed = capsys.readouterr().out
    for key in ("runs", "out", "price", "currency", "watch", "serve", "port"):
        assert f"\n  {key} " in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a[b]c[/d]", 'it\'s "x"\\', "x=y,z", "~", "模型 ${x}"])
def test_the_command_takes_any_name_of_a_folder_and_prints_the_page(monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / name, steps=1)
    for arguments in ([name], [run, "price=2", "currency=EUR"]):
        call(monkeypatch, *arguments)
        assert capsys.readouterr().out == f"{arguments[0]}/report.html\n"
    page = (run / "report.html").read_text("utf-8")
    assert "0.4 EUR" in page
    assert not list(run.glob(".*"))


def test_several_runs_go_to_one_file_with_a_range_of_prices(monkeypatch, capsys, tmp_path):
    runs = [make_run(tmp_path / f"seed{seed}", steps=1, seed=seed) for seed in range(2)]
    out = tmp_path / "new" / "both.html"
    call(monkeypatch, *runs, f"out={out}", "price=[1,2.5]")
    assert capsys.readouterr().out == f"{out}\n"
    assert "at 1 to 2.5 an hour" in out.read_text("utf-8")


def test_a_page_replaces_pages_alone(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=1)
    (tmp_path / "thesis.md").write_text("years of work")
    for name, message in (("thesis.md", "is no report of this project"), ("run", "is a folder: name a file in it")):
        monkeypatch.setattr(sys, "argv", ["report", str(run), f"out={tmp_path / name}"])
        with pytest.raises(UserError, match=message):
            report.main()
    assert (tmp_path / "thesis.md").read_text() == "years of work"
    monkeypatch.setattr(sys, "argv", ["report", str(run), f"out={tmp_path / 'page.html'}"])
    for _ in range(2):
        report.main()
