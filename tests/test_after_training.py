"""After the last step: a stage that fails says so, and takes none of the others with it."""

import json
import shutil
import sys

import pytest
from configurations import compose
from rich.console import Console

from data_prep.cli import CONFIGS, UserError, quoted
from verl_recipes import train, warm_start
from verl_recipes.run.folder import RunFolder, append_line, as_lines, write_whole
from verl_recipes.run.preflight import check_place

STAGES = {
    "to_hugging_face": "model",
    "write_summary": "summary.json",
    "write_curves": "curves.png",
    "write_report": "report.html",
}
ERRORS = [RuntimeError("no memory"), UserError("no disk")] * 2
NAME = "tiny [bold] [i]= 中文"
pytestmark = pytest.mark.slow


def response(problem, right):
    numbers = [problem + 1, problem + 2, problem + 3]
    return {
        "step": 0,
        "prompt_id": f"p{problem}",
        "prompt": f"make {sum(numbers)} of {numbers}",
        "response": f"{numbers[0]}+{numbers[1]}={numbers[0] + numbers[1]}</think><answer>1</answer>",
        "ground_truth": {"numbers": numbers, "target": sum(numbers)},
        "data_source": "countdown/3_numbers",
        "extra_info": {"split": "test", "index": problem},
        "response_tokens": 9,
        "truncated": False,
        "repeated": False,
        "score": right,
        "acc": right,
        "format": 1.0,
        "reason": "right" if right else "wrong_value",
    }


@pytest.fixture
def run(tmp_path):
    """What verl leaves in a run's folder after two steps, and the configuration."""
    cfg = compose("train", f"name={quoted(NAME)}", f"run_dir={quoted(tmp_path / NAME)}", "eval_n=2")
    cfg.trainer.total_training_steps = 2
    run = RunFolder(cfg.run_dir)
    actor = run.checkpoints / "global_step_2" / "actor"
    shutil.copytree(CONFIGS.parent / "assets" / "tiny_base", actor / "huggingface")
    (actor / "fsdp_config.json").write_text("{}")
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    for step in (0, 2):
        rows = [response(problem, float(problem < step)) for problem in range(4) for _ in range(2)]
        write_whole(run.samples_of("validation", step), as_lines(rows))
        write_whole(run.samples_of("train", step), as_lines(rows))
        append_line(run.metrics, {"step": step, "data": {"reward/acc": 0.5, "critic/score/mean": 0.5}})
    run.write_mark("run")
    return cfg, run


def finish(cfg, run):
    with Console(record=True, width=500) as console:
        whole = train.finish(cfg, run, console, lambda trained: {"resumed_from": 0, "seconds": {"total": 1.0}})
    return whole, console.export_text()


@pytest.mark.parametrize(("failing", "error"), zip(STAGES, ERRORS, strict=True))
def test_a_stage_that_fails_says_so_and_the_others_are_there(run, monkeypatch, failing, error):
    cfg, run = run
    for path in (run.curves, run.report):
        write_whole(path, "of an earlier step")

    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(train, failing, fails)
        whole, said = finish(cfg, run)
    assert not whole
    assert "no memory" in said or "no disk" in said
    assert f"{run.path / STAGES[failing]}" in said
    assert "the same command tries again" in said
    assert {name for name in STAGES.values() if (run.path / name).exists()} == {*STAGES.values()} - {STAGES[failing]}
    assert not train.is_complete(cfg, run)
    assert finish(cfg, run)[0]
    assert train.is_complete(cfg, run)


def test_what_was_put_into_the_model_meanwhile_is_not_removed(run):
    cfg, run = run
    run.model.mkdir()
    (run.model / "model-q4.gguf").touch()
    with pytest.raises(UserError, match="is not of the run"):
        finish(cfg, run)
    assert (run.model / "model-q4.gguf").exists()


def test_checkpoints_may_lie_elsewhere(run, tmp_path):
    cfg, run = run
    run.checkpoints.rename(tmp_path / "elsewhere")
    run = RunFolder(run.path, tmp_path / "elsewhere")
    run.write_mark("run")
    assert finish(cfg, run)[0]
    assert train.is_complete(cfg, RunFolder(run.path))  # the mark knows the place
    with pytest.raises(UserError, match="is a new run: name an empty folder"):
        check_place(RunFolder(tmp_path / "another", run.checkpoints))


def test_a_name_with_brackets_is_shown_as_it_is(run, capsys):
    cfg, run = run
    assert finish(cfg, run)[0]
    with Console(record=True, width=200) as console:
        train.show(run, console)
    assert NAME in console.export_text()
    assert json.loads(run.summary.read_text(encoding="utf-8"))["name"] == NAME
    assert NAME in run.report.read_text(encoding="utf-8")


@pytest.fixture
def without_matplotlib(monkeypatch):
    for name in [each for each in sys.modules if each.startswith("matplotlib.")] + ["verl_recipes.reporting.draw"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("without_matplotlib")
def test_a_machine_without_matplotlib_lacks_the_pictures_alone(run):
    cfg, run = run
    whole, said = finish(cfg, run)
    assert whole
    assert said.count("matplotlib is not installed") == 1
    assert {name for name in STAGES.values() if (run.path / name).exists()} == {*STAGES.values()} - {"curves.png"}
    assert train.is_complete(cfg, run)


def test_a_command_that_makes_what_is_missing_keeps_the_model_and_the_seconds_of_the_training(run):
    cfg, run = run
    assert finish(cfg, run)[0]
    model, summary = run.model.stat().st_ino, run.summary.read_text(encoding="utf-8")
    run.report.unlink()
    with Console(record=True, width=500) as console:
        assert train.finish(cfg, run, console, lambda trained: {"resumed_from": 2, "seconds": {"total": 0.1}})
    assert (run.model.stat().st_ino, run.summary.read_text(encoding="utf-8")) == (model, summary)
    assert train.is_complete(cfg, run)


def test_more_steps_replace_a_model_that_is_a_link(run, tmp_path):
    cfg, run = run
    shutil.copytree(CONFIGS.parent / "tests" / "fuzz_corpus", tmp_path / "other disk")
    run.model.symlink_to(tmp_path / "other disk")
    assert finish(cfg, run)[0]
    assert (tmp_path / "other disk" / "config.json").is_file()


def test_a_run_whose_checkpoints_are_gone_is_complete_or_refused_and_never_trained_again(run):
    cfg, run = run
    append_line(run.metrics, {"step": 2, "data": {"timing_s/save_checkpoint": 0.1}})
    assert finish(cfg, run)[0]
    shutil.rmtree(run.checkpoints)
    train.check_last(cfg, run, 0)
    assert train.is_complete(cfg, run)
    cfg.trainer.total_training_steps = 4
    with pytest.raises(UserError, match=r"saved a checkpoint at step 2, and .*checkpoints holds none: put it back"):
        train.check_last(cfg, run, 0)


@pytest.mark.usefixtures("without_matplotlib")
def test_a_warm_start_ends_without_matplotlib_too(run):
    cfg, run = run
    write_whole(run.metrics, as_lines([{"step": 2, "data": {"train/loss": 1.5, "val/loss": 1.0}}]))
    with Console(record=True, width=500) as console:
        warm_start.finish(cfg, run, console)
    assert f"is not installed, so there is no {run.curves}" in console.export_text()
    assert (run.model.exists(), run.summary.exists(), run.curves.exists()) == (True, True, False)


def test_a_warm_starts_model_is_that_of_the_least_loss(run):
    cfg, run = run
    shutil.copytree(run.checkpoints / "global_step_2", run.checkpoints / "global_step_1")
    lines = [{"step": step, "data": {"train/loss": 1.5, "val/loss": loss}} for step, loss in ((1, 1.0), (2, 1.2))]
    write_whole(run.metrics, as_lines(lines))
    warm_start.finish(cfg, run, Console(quiet=True))
    assert json.loads(run.summary.read_text(encoding="utf-8"))["best_step"] == 1


@pytest.mark.parametrize("lines", [7, 8])
def test_a_measurement_of_the_base_that_was_cut_short_is_made_again(run, monkeypatch, lines):
    cfg, run = run
    cfg.data.val_batch_size, cfg.trainer.total_training_steps = 4, 4
    for step, rows in ((0, lines), (4, 8)):
        write_whole(run.samples_of("validation", step), "{}\n" * rows)
    starts = []
    monkeypatch.setattr(train, "start_verl", lambda *_, **options: starts.append(options["val_before_train"]))
    train.train(cfg, run, Console(quiet=True), problems=4)
    assert starts == [lines < 8]
