"""What a run writes and reads, without starting verl."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory

import psutil
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from data_prep.cli import CONFIGS, UserError
from verl_recipes import train
from verl_recipes.in_verl import alarms
from verl_recipes.measure.batch import component_metrics
from verl_recipes.run import preflight as checks
from verl_recipes.run import supervise
from verl_recipes.run.folder import RunFolder
from verl_recipes.run.log import reason
from verl_recipes.run.start import merge_metrics

ROOT = CONFIGS.parent


def test_batch_metrics_are_means_and_shares_over_responses_and_groups():
    row = {"step": 1, "prompt_id": "a", "response": "x", "score": 0.1, "format": 1.0, "reason": "y", "truncated": True}
    rows = [row, row, row | {"prompt_id": "b"}, row | {"prompt_id": "b", "score": 1.0, "format": 0.0, "response": "z"}]
    assert component_metrics(rows, "reward") == {
        "reward/score": pytest.approx(0.325),
        "reward/format": 0.75,
        "reward/truncated": 1.0,
        "reward/unparsable": 0.25,
        "reward/identical": 0.75,
        "reward/groups_without_signal": 0.5,
    }
    assert "reward/unparsable" not in component_metrics([{**row, "format": None}], "reward")


def test_degenerate_output_ends_a_run_after_that_many_steps_and_names_the_last_good_checkpoint(tmp_path):
    for step in (10, 20, 22):
        (tmp_path / f"global_step_{step}" / "actor").mkdir(parents=True)
    history, limits = {}, {"no_such": 0.1, "truncated": None, "repeated": 0.5}
    shares = dict.fromkeys(range(1, 22), 0.4) | {17: 0.9, 18: 0.9, 22: 0.5, 23: 1.0, 24: 0.7}
    for step, share in shares.items():
        alarms.check_output(history, limits, steps=3, checkpoints=tmp_path)
        history[step] = {"reward/repeated": share, "reward/truncated": 1.0}
    with pytest.raises(alarms.DegenerateOutputError, match="from step 22 on") as caught:
        alarms.check_output(history, limits, steps=3, checkpoints=tmp_path)
    assert f"last good checkpoint: {tmp_path}/global_step_20;" in str(caught.value)
    (tmp_path / "log.txt").write_text(
        "\x1b[36m(TaskRunner pid=7)\x1b[0m Traceback (most recent call last):\n"
        f"\x1b[36m(TaskRunner pid=7)\x1b[0m verl_recipes.in_verl.alarms.DegenerateOutputError: {caught.value}\n"
        "ray.exceptions.RayTaskError(DegenerateOutputError): ray::TaskRunner.run() (pid=7)\n"
    )
    assert reason(tmp_path / "log.txt").endswith(str(caught.value))


def test_without_a_good_checkpoint_the_alarm_says_so(tmp_path):
    (tmp_path / "global_step_1").mkdir()  # removed by verl, but for the state of its data loader
    (tmp_path / "global_step_2" / "actor").mkdir(parents=True)  # it wrote the responses of step 3
    with pytest.raises(alarms.DegenerateOutputError, match="last good checkpoint: none"):
        alarms.check_output({3: {"reward/identical": 0.9}}, {"identical": 0.9}, steps=1, checkpoints=tmp_path)


def test_a_resumed_run_keeps_every_step_once(tmp_path):
    def write(name, steps):
        (tmp_path / name).write_text("".join(json.dumps({"step": s, "data": {"from": name}}) + "\n" for s in steps))

    write("metrics.jsonl", [0, 1, 2, 3, 4])
    write("metrics.part.jsonl", [3, 4, 5])
    with (tmp_path / "metrics.part.jsonl").open("a") as part:
        part.write('{"step": 6, "data": {"fr')
    merge_metrics(RunFolder(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["data"]["from"]) for line in lines] == [
        *((step, "metrics.jsonl") for step in (0, 1, 2)),
        *((step, "metrics.part.jsonl") for step in (3, 4, 5)),
    ]


def test_a_step_that_was_saved_and_not_logged_has_what_its_samples_tell_and_later_its_evaluation(tmp_path):
    def line(step, **data):
        return json.dumps({"step": step, "data": data}) + "\n"

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    (tmp_path / "samples" / "train").mkdir(parents=True)
    rows = [{"prompt_id": "a", "response": str(i), "score": float(i), "acc": float(i)} for i in (0, 1)]
    (tmp_path / "samples" / "train" / "2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.part.jsonl").write_text(line(1, loss=0.5))
    for evaluated in ({}, {"val": 1.0}):
        if evaluated:
            (tmp_path / "metrics.part.jsonl").write_text(line(2, **evaluated))
        merge_metrics(RunFolder(tmp_path))
        first, second = (json.loads(each) for each in (tmp_path / "metrics.jsonl").read_text().splitlines())
        assert first == {"step": 1, "data": {"loss": 0.5}}
        expected = {"training/global_step": 2, "reward/acc": 0.5, "reward/groups_without_signal": 0.0} | evaluated
        assert expected.items() <= second["data"].items()


def test_only_our_own_new_and_unused_segments_are_removed(tmp_path):
    used, unused, older = (shared_memory.SharedMemory(create=True, size=8) for _ in range(3))
    unused.close()
    older.close()
    (tmp_path / "segments").write_text(older.name)
    try:
        supervise.remove(tmp_path)
        names = os.listdir("/dev/shm")
        assert used.name in names
        assert older.name in names
        assert unused.name not in names
    finally:
        used.close()
        used.unlink()
        older.unlink()


def test_what_a_killed_run_left_goes_at_the_next_start(monkeypatch, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    segment = shared_memory.SharedMemory(create=True, size=8)
    segment.close()
    monkeypatch.setattr(supervise, "TEMPORARY", tmp_path)
    killed, ours = (tmp_path / f"{supervise.SCRATCH}{process}-x" for process in (dead.pid, os.getpid()))
    foreign = tmp_path / f"{supervise.SCRATCH}notes"
    for folder in (killed, ours, foreign):
        folder.mkdir()
    (killed / "segments").touch()
    supervise.remove_what_the_killed_left()
    assert set(tmp_path.iterdir()) == {ours, foreign}
    assert segment.name not in os.listdir("/dev/shm")


def test_a_process_that_verl_would_wait_for_is_missed_once_it_is_gone(monkeypatch):
    monkeypatch.setattr(supervise, "DEAD", 0.5)
    name = supervise.WATCHED[0]
    process = subprocess.Popen([name, "600"], executable="sleep")
    watched = {}
    try:
        assert supervise.who_died(watched) == ""
        time.sleep(0.6)
        assert supervise.who_died(watched) == ""  # it is there still
    finally:
        process.kill()
        process.wait()
    time.sleep(0.6)
    assert supervise.who_died(watched) == name


def test_orphans_end_too():
    """A grandchild whose parent has gone is found and ended, even if it ignores SIGTERM."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = (
        "import sys; from subprocess import DEVNULL, Popen\n"
        f"print(Popen([sys.executable, '-c', {stubborn!r}], stdout=DEVNULL, stderr=DEVNULL).pid)"
    )
    script = (
        "import ctypes, subprocess, sys\nfrom verl_recipes.run import supervise\n"
        "ctypes.CDLL(None).prctl(supervise.PR_SET_CHILD_SUBREAPER, 1)\n"
        f"print(subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True).stdout)\n"
        "supervise.end_descendants(patience=1)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert not psutil.pid_exists(int(result.stdout))


def test_a_second_signal_does_not_cut_the_cleaning_short(tmp_path):
    """A run whose verl ignores SIGTERM, and a scheduler that does not wait."""
    stubborn = tmp_path / "python"
    stubborn.write_text("#!/bin/sh\ntrap '' TERM\ntouch started\nwhile :; do sleep 1; done\n")
    stubborn.chmod(0o755)
    script = (
        "import sys; from pathlib import Path; from verl_recipes.run import supervise\n"
        f"sys.executable, supervise.TEMPORARY = {str(stubborn)!r}, Path.cwd()\n"
        "supervise.end_descendants.__defaults__ = (1,)\n"
        "supervise.run_verl(supervise.RunFolder('.'), {}, lambda: None)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    for _ in range(5):
        run.terminate()
        time.sleep(0.1)
    assert run.wait(timeout=30) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob(f"{supervise.SCRATCH}*"))


@pytest.mark.parametrize(
    ("message", "starts"),
    [("verl stopped: ActorDiedError: killed", 3), (f"verl stopped: {alarms.DegenerateOutputError.__name__}: x", 1)],
)
def test_verl_is_started_again_as_often_as_asked_but_not_after_an_alarm(tmp_path, monkeypatch, message, starts):
    calls = []

    def stops(*args, **trainer):
        calls.append(args)
        raise train.VerlStoppedError(message)

    monkeypatch.setattr(train, "start_verl", stops)
    cfg = OmegaConf.create({"trainer": {"total_training_steps": 4, "restarts": 2}, "data": {"val_batch_size": None}})
    with pytest.raises(UserError, match="verl stopped"):
        train.train(cfg, RunFolder(tmp_path), Console(quiet=True))
    assert len(calls) == starts


def test_a_full_disk_is_one_line():
    main = "@cli.command('render', cli.Checked)\ndef main(cfg): Path('/dev/full').write_text('x')"
    code = f"from pathlib import Path\nfrom data_prep import cli\n{main}\nmain()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line = "error: the disk is full; free some of it, and the same command goes on\n"
    assert (result.returncode, result.stderr) == (1, line)


def test_too_little_memory_or_disk_is_one_line(tmp_path, monkeypatch):
    cfg = OmegaConf.create(
        {"trainer": {"n_gpus_per_node": 1, "nnodes": 1, "device": "cpu", "max_actor_ckpt_to_keep": 2}}
    )
    checks.check_space(cfg, tmp_path, weights=2_000_000)
    with pytest.raises(UserError, match="GiB of memory are free"):
        checks.check_space(cfg, tmp_path, weights=10**12)
    cfg.trainer.device = "cuda"
    with pytest.raises(UserError, match="GiB of disk are free"):
        checks.check_space(cfg, tmp_path, weights=10**15)


def test_the_reason_of_a_failure_is_the_last_exception(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        "ValueError: of the run before\n"
        "\x1b[36m(CPUServer pid=7)\x1b[0m (EngineCore pid=8) ERROR 11-22 11:52:31 [core.py:1346] OSError: no file\n"
        "\x1b[36m(WorkerDict pid=7)\x1b[0m     raise RuntimeError(\n"
        "ray.exceptions.RayTaskError(RuntimeError): ray::TaskRunner.run()\nSet the environment variable\n"
    )
    assert reason(log, offset=30) == "OSError: no file"
    assert reason(log, offset=log.stat().st_size) == "it told of no error"
    log.write_text("Exception: The current node timed out during startup.\n")
    assert reason(log) == "Exception: The current node timed out during startup."
