"""Which test of a run was the best, what stays for it, and when the tests end the run."""

from zipfile import ZipFile

import pytest
from configurations import compose
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from data_prep.cli import UserError
from verl_recipes import train
from verl_recipes.planning.space import checkpoints_at_once
from verl_recipes.reporting.run import read_summary
from verl_recipes.run.best import best_step, early_end, evaluations, is_enough, last_step
from verl_recipes.run.checkpoints import TRACKER, checkpoint_steps, remove_old
from verl_recipes.run.folder import RunFolder, as_lines, write_json
from verl_recipes.run.start import as_verl_wants
from verl_recipes.settings.configuration import check_choice


def run_with(path, *means):
    """The folder of a run that was tested before its first step, as `means[0]`, and after every fifth step."""
    run = RunFolder(path)
    names = ("val-core/countdown/a/acc/mean@1", "val-core/countdown/b/acc/mean@1")
    tests = [dict(zip(names, (mean - 0.1, mean + 0.1), strict=True)) for mean in means]
    lines = [{"step": 5 * i, "data": data} for i, data in enumerate([*tests, {"reward/acc": 0.9}])]
    run.metrics.write_text(as_lines(lines), encoding="utf-8")
    return run


def asked(patience, steps=30):
    return OmegaConf.create({"patience": patience, "trainer": {"total_training_steps": steps}})


def test_a_test_counts_with_the_mean_of_its_sets_and_the_bases_does_not(tmp_path):
    run = run_with(tmp_path, 0.9, 0.2, 0.5, 0.4)
    assert evaluations(run) == pytest.approx({5: 0.2, 10: 0.5, 15: 0.4})
    assert best_step(evaluations(run)) == 10


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 4))
def test_a_run_ends_at_the_first_test_by_which_so_many_brought_nothing_better(values, patience):
    for count in range(1, len(values) + 1):
        seen = values[:count]
        assert is_enough(dict(enumerate(seen, 1)), patience) == (count - 1 - seen.index(max(seen)) >= patience)
    assert not any(is_enough(dict(enumerate(values, 1)), none) for none in (None, 0))


def test_the_tests_decide_the_last_step_and_more_patience_goes_on(tmp_path):
    run = run_with(tmp_path, 0.2, 0.5, 0.4, 0.3)
    assert [early_end(asked(patience), run) for patience in (None, 2, 3)] == [0, 15, 0]
    assert [last_step(asked(patience), run) for patience in (None, 2, 3)] == [30, 15, 30]


@pytest.mark.parametrize(("means", "again"), [((0.9, 0.2), True), ((0.9, 0.2, 0.5), False)])
def test_a_resume_makes_up_for_the_test_of_a_step_that_was_saved_and_not_tested(tmp_path, monkeypatch, means, again):
    run, starts = run_with(tmp_path, *means), []
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / TRACKER).write_text("10", encoding="utf-8")
    for step in (0, 30):
        run.samples_of("validation", step).parent.mkdir(parents=True, exist_ok=True)
        run.samples_of("validation", step).write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(train, "start_verl", lambda *_, **options: starts.append(options["val_before_train"]))
    more = {"eval_n": 1, "data": {"val_batch_size": None}, "trainer": {"restarts": 0, "test_freq": 5}}
    run.metrics.rename(run.metrics_part)
    train.train(OmegaConf.merge(asked(None), more), run, Console(quiet=True), problems=1)
    assert starts == [again]
    assert run.metrics.exists()


@pytest.mark.parametrize(("patience", "starts"), [(2, 0), (3, 1)])
def test_a_run_that_its_tests_ended_starts_again_only_with_more_patience(tmp_path, monkeypatch, patience, starts):
    """Its summary, which says that it is complete, is gone then."""
    run, summaries = run_with(tmp_path, 0.2, 0.5, 0.4, 0.3), []
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / TRACKER).write_text("15", encoding="utf-8")
    write_json(run.summary, {"steps": 15, "early_end": True})
    for step in (15, 30):
        run.samples_of("validation", step).parent.mkdir(parents=True, exist_ok=True)
        run.samples_of("validation", step).write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(train, "start_verl", lambda *_, **__: summaries.append(run.summary.exists()))
    cfg = OmegaConf.merge(asked(patience), {"eval_n": 1, "data": {"val_batch_size": None}, "trainer": {"restarts": 0}})
    train.train(cfg, run, Console(quiet=True), problems=1)
    assert summaries == [False] * starts


def test_the_summary_of_an_early_end_is_that_of_a_complete_run(tmp_path):
    run = RunFolder(tmp_path)
    for early, state in ((True, "complete"), (False, "ended early")):
        write_json(run.summary, {"steps": 15, "early_end": early})
        assert read_summary(run, {"trainer": {"total_training_steps": 30}})[1] == state


def test_the_checkpoint_of_the_best_test_stays_beside_the_newest(tmp_path):
    for step in (5, 10, 15, 20, 25):
        (tmp_path / f"global_step_{step}" / "actor").mkdir(parents=True)
    for name in ("data.pt", "actor/model_world_size_1_rank_0.pt"):
        ZipFile(tmp_path / "global_step_20" / name, "w").close()
    (tmp_path / TRACKER).write_text("20", encoding="utf-8")  # 25 is being written
    remove_old(tmp_path, 1, best=10)
    assert checkpoint_steps(tmp_path) == [25, 20, 10]


@pytest.mark.slow
def test_verl_removes_no_checkpoint_itself_and_the_disk_must_hold_the_best_one_too():
    tests = ("trainer.save_freq=5", "trainer.test_freq=5")
    last, best = compose("train", *tests), compose("train", *tests, "keep=best")
    names = ("max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep")
    for cfg in (last, best):
        assert [as_verl_wants(cfg, {})["trainer"][name] for name in names] == [None, None]
    assert checkpoints_at_once(best) == checkpoints_at_once(last) + 1


@pytest.mark.parametrize("key", ["patience=2", "keep=best"])
@pytest.mark.parametrize("freq", [-1, 15])
def test_tests_that_decide_something_are_at_steps_that_are_saved(key, freq):
    cfg = compose("train", key, f"trainer.test_freq={freq}", "trainer.save_freq=10")
    with pytest.raises(UserError, match=f"{key} needs tests in training.*test_freq={freq} must be a multiple of"):
        check_choice(cfg)
    check_choice(compose("train", key, "trainer.test_freq=20", "trainer.save_freq=10"))


@pytest.mark.parametrize("key", ["patience=2", "keep=best"])
def test_one_test_decides_nothing_so_a_key_that_would_do_nothing_is_refused(key):
    with pytest.raises(UserError, match=f"{key} needs several tests: with trainer.test_freq=30 only"):
        check_choice(compose("train", key))
