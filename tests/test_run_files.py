"""What a run writes and reads, without starting verl."""

import copy
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from contextlib import chdir, suppress
from io import StringIO
from multiprocessing import shared_memory
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from configurations import compose
from huggingface_hub import constants
from omegaconf import OmegaConf
from rich.console import Console

from data_prep.cli import CONFIGS, UserError, quoted
from verl_recipes import train
from verl_recipes.in_verl import alarms
from verl_recipes.measure.batch import component_metrics
from verl_recipes.planning import space
from verl_recipes.run import preflight as checks
from verl_recipes.run import start, supervise
from verl_recipes.run.folder import RunFolder, append_line, as_lines, read_lines, read_metrics, write_whole
from verl_recipes.run.goodput import goodput
from verl_recipes.run.log import last_error
from verl_recipes.run.progress import Progress
from verl_recipes.run.start import merge_metrics

ROOT = CONFIGS.parent


def test_batch_metrics_are_means_and_shares_over_responses_and_groups():
    row = {"step": 1, "prompt_id": "a", "response": "x", "score": 0.1, "format": 1.0, "reason": "y", "truncated": True}
    rows = [row, row, row | {"prompt_id": "b"}, row | {"prompt_id": "b", "score": 1.0, "format": 0.0, "response": "z"}]
    assert component_metrics(rows) == {
        "reward/score": pytest.approx(0.325),
        "reward/format": 0.75,
        "reward/truncated": 1.0,
        "reward/unparsable": 0.25,
        "reward/identical": 0.75,
        "reward/groups_without_signal": 0.5,
    }
    one = component_metrics([{**row, "format": None}])
    assert not {"reward/unparsable", "reward/groups_without_signal"} & one.keys()  # one response is no group


def test_a_whole_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    on_disk, named = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: on_disk.append(Path(f"/proc/self/fd/{file}").read_bytes()))
    monkeypatch.setattr(os, "replace", lambda partial, path: (on_disk.append("named"), named(partial, path)))
    write_whole(tmp_path / "x", "new")
    assert on_disk == [b"new", "named"]
    assert (tmp_path / "x").read_bytes() == b"new"


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
    assert last_error(tmp_path / "log.txt").endswith(str(caught.value))


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


def test_a_line_that_a_full_disk_cut_short_costs_its_steps_and_not_the_run(tmp_path):
    run = RunFolder(tmp_path)
    lines = '{"step": 1, "data": {}}\n{"step": 2, "da{"step": 3, "data": {}}\n{"step": 4, "data": {}}\n'
    run.metrics_part.write_text(lines, encoding="utf-8")
    merge_metrics(run)
    assert [line["step"] for line in read_lines(run.metrics)] == [1, 4]


def test_steps_that_the_present_start_makes_again_are_not_done(tmp_path):
    run = RunFolder(tmp_path)
    run.metrics.write_text(as_lines({"step": step, "data": {"reward/score": 0.5}} for step in range(7)))
    run.metrics_part.write_text(as_lines([{"step": 3, "data": {"reward/score": 0.6}}]))
    assert max(read_metrics(run)) == 3


def test_a_step_that_was_saved_but_not_logged_gets_the_metrics_of_its_samples_and_later_its_evaluation(tmp_path):
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


SEGMENT = "from multiprocessing import shared_memory as s; m = s.SharedMemory(create=True, size=8); print(m.name)"


@pytest.mark.slow
def test_only_segments_of_the_runs_own_processes_that_none_maps_any_more_are_removed(tmp_path):
    """Beside those: one that another program made during the run and does not map, and one that another still maps."""
    foreign, used = (shared_memory.SharedMemory(create=True, size=8) for _ in range(2))
    foreign.close()
    code = f"{SEGMENT}; s.SharedMemory({used.name!r}); import sys; sys.stdout.flush(); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    own = child.stdout.readline().strip()
    try:
        supervise.note_segments(tmp_path)
        supervise.end_descendants()  # the tracker of the child's segments too
        assert {own, foreign.name, used.name} <= supervise.segments()
        supervise.remove(tmp_path)
        assert supervise.segments() & {own, foreign.name, used.name} == {foreign.name, used.name}
    finally:
        used.close()
        for segment in (foreign, used):
            segment.unlink()


def test_what_a_killed_run_left_goes_at_the_next_start_and_no_live_runs_folder(monkeypatch, tmp_path):
    """Whether a run is alive is asked of the lock: of a run in another container the process cannot be seen."""
    segment = shared_memory.SharedMemory(create=True, size=8)
    segment.close()
    monkeypatch.setattr(supervise, "TEMPORARY", tmp_path)
    killed, unseen, foreign = (tmp_path / f"{supervise.SCRATCH}{name}" for name in ("1-x", "99999999-x", "notes"))
    for folder in (killed, unseen, foreign):
        folder.mkdir()
    supervise.lock_scratch(killed).close()
    (killed / supervise.NOTED).write_text(segment.name, encoding="utf-8")
    with supervise.lock_scratch(unseen):
        assert supervise.abandoned_scratch() == [killed]
        supervise.remove(killed)
        assert set(tmp_path.iterdir()) == {unseen, foreign}
    assert segment.name not in supervise.segments()


def begun(monkeypatch, run, **environment):
    """The command and the environment that a start of verl gets."""
    seen = []

    def start(command, *, environment, output, **_):
        seen.append((command, environment))
        return subprocess.Popen(["true"])

    monkeypatch.setattr(supervise, "start", start)
    supervise.run_verl(run, environment, lambda: None)
    return seen[0]


def test_a_run_has_a_token_of_its_own_and_writes_none_to_the_home(tmp_path, monkeypatch):
    assert len({begun(monkeypatch, RunFolder(tmp_path))[1]["RAY_AUTH_TOKEN"] for _ in range(2)}) == 2


def test_a_run_on_a_cpu_is_told_of_no_gpus_and_one_on_gpus_of_those_it_may_use(tmp_path, monkeypatch):
    for name in supervise.HIDDEN:
        monkeypatch.setenv(name, "0")
    for platform, left in (("cpu", set()), ("cuda", {*supervise.HIDDEN[2:]})):
        told = begun(monkeypatch, RunFolder(tmp_path), VERL_PLATFORM=platform)[1]
        assert told.keys() & {*supervise.HIDDEN} == left
        assert told["HF_DATASETS_CACHE"] == told["TMPDIR"]


def test_rays_workers_bear_a_blank_in_the_path_of_python(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/a b/python")
    assert begun(monkeypatch, RunFolder(tmp_path))[0][-1].endswith("""py_executable="'/a b/python'\"""")


def test_a_job_may_bring_what_its_run_sets_too(tmp_path, monkeypatch):
    from ray._private.worker import _merge_runtime_env

    monkeypatch.setattr(supervise, "in_job", lambda: True)
    assert begun(monkeypatch, RunFolder(tmp_path))[1]["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == "1"
    one, other = {"env_vars": {"WANDB_MODE": "offline"}}, {"env_vars": {"WANDB_MODE": "online"}}
    assert _merge_runtime_env(one, other, override=True)["env_vars"] == {"WANDB_MODE": "online"}


def test_a_tmp_without_programs_does_without_the_fork_server(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    command, environment = begun(monkeypatch, RunFolder(tmp_path), VERL_PLATFORM="cpu")
    assert command[:3] == [sys.executable, "-m", supervise.PPO]
    assert supervise.PYTHON not in environment


def test_what_another_user_left_is_that_users(monkeypatch, tmp_path):
    monkeypatch.setattr(supervise, "TEMPORARY", tmp_path)
    folder = tmp_path / f"{supervise.SCRATCH}1-x"
    folder.mkdir()
    (folder / supervise.LOCK).touch()
    assert supervise.abandoned_scratch() == [folder]
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert supervise.abandoned_scratch() == []


def test_segments_that_are_gone_are_forgotten(tmp_path):
    there = shared_memory.SharedMemory(create=True, size=8)
    (tmp_path / supervise.NOTED).write_text("psm_gone", encoding="utf-8")
    supervise.note_segments(tmp_path)
    there.close()
    there.unlink()
    assert "psm_gone" not in supervise.noted_segments(tmp_path)


@pytest.mark.slow
def test_a_dead_engine_is_noticed(monkeypatch):
    monkeypatch.setattr(supervise, "DEAD", 0.5)
    process = subprocess.Popen([supervise.ENGINE, "600"], executable="sleep")
    engines = {}
    try:
        assert not supervise.an_engine_died(engines)
        time.sleep(0.6)
        assert not supervise.an_engine_died(engines)  # it is there still
    finally:
        process.kill()
        process.wait()
    time.sleep(0.6)
    assert supervise.an_engine_died(engines)


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
        "supervise.end_descendants()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert not psutil.pid_exists(int(result.stdout))


@pytest.mark.slow
def test_a_second_signal_does_not_interrupt_the_cleanup(tmp_path):
    """Cleaning that takes a second, and a scheduler that does not wait."""
    endless = tmp_path / "python"
    endless.write_text("#!/bin/sh\ntouch started\nwhile :; do sleep 1; done\n", encoding="utf-8")
    endless.chmod(0o755)
    script = (
        "import sys, time; from pathlib import Path; from verl_recipes.run import supervise\n"
        f"sys.executable, supervise.TEMPORARY = {str(endless)!r}, Path.cwd()\n"
        "remove = supervise.remove; supervise.remove = lambda scratch: (time.sleep(1), remove(scratch))\n"
        "supervise.run_verl(supervise.RunFolder('.'), {}, lambda: None)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    while not (tmp_path / "started").exists():
        assert run.poll() is None
        time.sleep(0.05)
    for _ in range(5):
        run.terminate()
        time.sleep(0.1)
    assert run.wait(timeout=30) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob(f"{supervise.SCRATCH}*"))


VERL = """
import subprocess, sys, time
from pathlib import Path
ray = subprocess.Popen(["sleep", "600"])
Path("started").touch()
while not Path("stop").exists():
    time.sleep(0.05)
time.sleep(0.5)
Path("saved").touch() if ray.poll() is None else None
sys.exit(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["command", "group", "everything", "timeout", "terminal"])
def test_verl_goes_on_to_save_whichever_processes_get_the_signal(tmp_path, whom):
    """The command alone; its process group, as `kill -- -PGID`; every process, as Slurm and systemd; `timeout`.

    A terminal that is closed sends SIGHUP, and every write to it fails from then on.
    """
    (tmp_path / "verl.py").write_text(VERL, encoding="utf-8")
    verl = tmp_path / "python"
    verl.write_text(f"#!/bin/sh\nexec {sys.executable} verl.py\n", encoding="utf-8")
    verl.chmod(0o755)
    script = (
        "import sys; from pathlib import Path; from verl_recipes.run import supervise\n"
        f"sys.executable, supervise.TEMPORARY = {str(verl)!r}, Path.cwd()\n"
        "supervise.run_verl(supervise.RunFolder('.'), {}, lambda: print('.', flush=True), notice=20)\n"
    )
    terminal, ours = os.openpty()
    command = [*(["timeout", "600"] if whom == "timeout" else []), sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def own_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` it is ignored
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    own = {"start_new_session": True, "preexec_fn": own_terminal}
    run = psutil.Popen(command, cwd=tmp_path, env=environment, stdin=ours, stdout=ours, stderr=ours, **own)
    os.close(ours)
    while not (tmp_path / "started").exists():
        assert run.poll() is None
        time.sleep(0.05)
    if whom == "group":
        os.killpg(run.pid, signal.SIGTERM)
    elif whom == "timeout":
        run.send_signal(signal.SIGALRM)  # as the kernel does when its time is over
    elif whom == "terminal":
        os.close(terminal)
    else:
        for process in [run, *(run.children(recursive=True) if whom == "everything" else [])]:
            process.terminate()
    assert run.wait(timeout=60) == (124 if whom == "timeout" else 128 + signal.SIGTERM)
    assert (tmp_path / "saved").exists()
    if whom != "terminal":
        os.close(terminal)


def test_services_that_ray_ends_itself_are_killed_at_once_and_not_those_that_a_scheduler_signals():
    """Ray sends SIGTERM, which is blocked, and waits a second for each."""
    code = "import subprocess, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    block = {"preexec_fn": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})}
    verl = psutil.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, encoding="utf-8", **block)
    service = psutil.Process(int(verl.stdout.readline()))
    try:
        supervise.end_services(verl.pid)
        assert service.status() != psutil.STATUS_ZOMBIE
        for process in (service, verl):
            process.terminate()
        supervise.end_services(verl.pid)
        assert verl.poll() is None
    finally:
        service.kill()
        assert verl.wait() == 0
    verl = psutil.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, encoding="utf-8", **block)
    psutil.Process(int(verl.stdout.readline())).terminate()
    supervise.end_services(verl.pid)
    assert verl.wait(timeout=30) == 0


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
    cfg = compose("train", "trainer.total_training_steps=4", "trainer.restarts=2")
    with pytest.raises(UserError, match="verl stopped"):
        train.train(cfg, RunFolder(tmp_path), Console(quiet=True), problems=1)
    assert len(calls) == starts


@pytest.mark.parametrize(
    ("errors", "starts", "why"),
    [
        ([start.NOT_STARTED], 2, ""),
        ([start.NOT_STARTED] * 2, 2, start.NOT_STARTED),
        (["out of memory"], 1, "out of memory"),
    ],
)
def test_verl_is_started_once_more_if_ray_was_too_slow(tmp_path, monkeypatch, errors, starts, why):
    run, left = RunFolder(tmp_path), list(errors)
    run.log.write_text(f"Exception: {start.NOT_STARTED}\n")  # of an earlier start
    calls = []

    def run_verl(*args, **options):
        calls.append(args)
        if left:
            with run.log.open("a") as log:
                log.write(f"Exception: {left.pop(0)}. This could happen\n")
            return 1
        return 0

    monkeypatch.setattr(start, "run_verl", run_verl)
    found = start.run_until_end(run, Console(quiet=True), {}, print)
    assert (bool(found), why in found) == (bool(why), True)
    assert len(calls) == starts


def test_a_measurement_that_is_started_again_changes_verls_configuration_and_not_the_runs(tmp_path, monkeypatch):
    cfg = compose("train")
    run, before = RunFolder(tmp_path), copy.deepcopy(cfg)
    monkeypatch.setattr(start, "run_verl", lambda *args, **options: 0)
    start.start_verl(cfg, run, Console(quiet=True), val_before_train=True, val_only=True)
    assert OmegaConf.load(run.verl_config).trainer.val_only
    assert (cfg, run.config.exists()) == (before, False)


def test_a_full_disk_is_one_line():
    main = "@cli.command('render', cli.Checked)\ndef main(cfg): Path('/dev/full').write_text('x')"
    code = f"from pathlib import Path\nfrom data_prep import cli\n{main}\nmain()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line = "error: the disk is full; free some space, and the same command goes on\n"
    assert (result.returncode, result.stderr) == (1, line)


def test_too_little_memory_or_disk_is_one_line_unless_forced(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # tests/run.sh sets it, and the second model is a hub's
    cfg = compose("train", f"run_dir='{tmp_path}'")
    monkeypatch.setattr(space, "free_memory", lambda: 10**12)
    monkeypatch.setattr(space, "free_disk", lambda folder: 10**12)
    checks.check_space(cfg, tmp_path)
    cfg.actor_rollout_ref.model.path, cfg.architecture.parameters = "some/model", 10**12
    with pytest.raises(UserError, match=r"GiB of memory are free.*GiB of disk at .* are free.*force=true") as error:
        checks.check_space(cfg, tmp_path)
    assert "\n" not in str(error.value)
    cfg.force = True
    checks.check_space(cfg, tmp_path)


@pytest.mark.slow
def test_the_head_of_a_cluster_needs_no_memory_for_a_run_on_gpus(tmp_path, monkeypatch):
    """Ray runs a job's command there, also if it has no GPU."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    cfg = compose("train", "hardware=h100", "model=qwen2.5_0.5b", f"run_dir='{tmp_path}'")
    monkeypatch.setattr(space, "free_memory", lambda: 2**30)
    monkeypatch.setattr(space, "free_disk", lambda folder: 10**12)
    with pytest.raises(UserError, match="of memory are free"):
        checks.check_space(cfg, tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    checks.check_space(cfg, tmp_path)


def test_the_reason_of_a_failure_is_the_last_exception(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        "ValueError: of the run before\n"
        "\x1b[36m(CPUServer pid=7)\x1b[0m (EngineCore pid=8) ERROR 11-22 11:52:31 [core.py:1346] OSError: no file\n"
        "\x1b[36m(WorkerDict pid=7)\x1b[0m     raise RuntimeError(\n"
        "ray.exceptions.RayTaskError(RuntimeError): ray::TaskRunner.run()\nSet the environment variable\n"
    )
    assert last_error(log, offset=30) == "OSError: no file"
    assert last_error(log, offset=log.stat().st_size) == "the log contains no error message"
    log.write_text("Exception: The current node timed out during startup.\n")
    assert last_error(log) == "Exception: The current node timed out during startup."
    died = "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task."
    log.write_text(f"RuntimeError: no materializable trajectories\n\x1b[36m(TaskRunner pid=7)\x1b[0m {died}\n")
    assert last_error(log) == died


def test_goodput_counts_each_second_of_every_start_once(tmp_path):
    """Killed in step 3, whose checkpoint was that of step 2; the second start repeats step 3 and ends."""
    run = RunFolder(tmp_path)
    run.samples.mkdir()

    def at(time, split, step):
        return {"time": time, "event": "generating", "split": split, "step": step}

    first = [at(130, "validation", 0), at(140, "train", 1), at(150, "train", 2), at(160, "train", 3)]
    first.append({"time": 165, "event": "generated", "split": "train", "step": 3})
    second = [at(230, "train", 3), at(245, "validation", 3)]
    run.events.write_text(as_lines([*first, *second]))
    starts = [("began", 100), ("began", 200), ("ended", 250)]
    run.starts.write_text(as_lines({"event": event, "time": time} for event, time in starts))
    run.metrics.write_text(as_lines([{"step": 2, "data": {"timing_s/save_checkpoint": 2.0}}]))
    parts = {"steps": 33.0, "start": 60.0, "evaluations": 15.0, "saves": 2.0, "lost": 5.0}
    assert goodput(run) == {"share": 33 / 115} | parts
    set_back = [("began", 200), ("began", 100), ("ended", 150)]
    run.starts.write_text(as_lines({"event": event, "time": time} for event, time in set_back))
    assert goodput(run) == {}  # the clock was set back in between, so nothing is known
    run.events.write_text(as_lines([*first[:3], at(149.9, "train", 3), *second]))
    run.starts.write_text(as_lines({"event": event, "time": time} for event, time in starts))
    assert goodput(run)["share"] > 0  # by less than a second: a time server's correction
    run.starts.write_text(as_lines([{"event": "began", "time": 100}, {"event": "ended", "time": 120}]))
    assert goodput(run) == {}  # within the only start, whose end is before its steps
    run.starts.unlink()
    assert goodput(run) == {}


def test_a_run_starts_a_ray_of_its_own_whatever_cluster_the_environment_names(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:6379")
    assert begun(monkeypatch, RunFolder(tmp_path))[1]["RAY_ADDRESS"] == "local"


def test_a_start_does_not_end_by_what_asked_an_earlier_one_to(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.stop.touch()  # the earlier one was killed before it could end
    assert begun(monkeypatch, run)


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "start", lambda *_, **__: subprocess.Popen(["sleep", "0.5"]))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert supervise.run_verl(RunFolder(tmp_path), {}, lambda: signal.raise_signal(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_verl_that_waits_for_a_dead_engine_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "DEAD", 0.5)
    verl = subprocess.Popen(["sleep", "600"])
    engine = subprocess.Popen([supervise.ENGINE, "600"], executable="sleep")
    late = time.monotonic() + 30
    try:
        why = supervise.wait_for_end(verl, tmp_path, engine.kill, lambda: time.monotonic() > late, lambda: True)
    finally:
        for process in (verl, engine):
            process.kill()
            process.wait()
    assert why.startswith(f"{supervise.ENGINE} died")


@pytest.mark.slow
def test_ray_is_asked_for_room_until_the_first_rollouts(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "what_lacks", lambda *_: "no room")
    for goes_on, why in ((lambda: False, "no room"), (lambda: True, "")):
        with subprocess.Popen(["sleep", "0.3"]) as verl:
            assert supervise.wait_for_end(verl, tmp_path, lambda: None, lambda: False, goes_on) == why


def test_a_new_run_does_not_take_over_the_checkpoints_of_another(tmp_path):
    (tmp_path / "other").mkdir()
    RunFolder(tmp_path / "other").write_mark("run")
    place = f"trainer.default_local_dir={quoted(tmp_path / 'other' / 'checkpoints')}"
    cfg = compose("train", f"run_dir={quoted(tmp_path / 'run')}", place)
    with pytest.raises(UserError, match=r"is in another run, .*other"):
        checks.preflight(cfg, RunFolder(cfg.run_dir, cfg.trainer.default_local_dir))


def test_a_run_is_refused_the_data_of_another_prompt(tmp_path):
    made = {"configuration": {"prompt": {"name": "mini_r1", "chat_template": "another"}}}
    made |= {"files": {"train.parquet": {}}, "versions": {"countdown-zero": "0"}}
    (tmp_path / "manifest.json").write_text(json.dumps(made), encoding="utf-8")
    pq.write_table(pa.table({name: [["x"]] for name in checks.COLUMNS}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="made with prompt=mini_r1, which has another chat template"):
        checks.check_data(compose("train"), "data.train_files", str(tmp_path / "train.parquet"))


@pytest.mark.slow
def test_a_data_folder_with_brackets_is_no_pattern(tmp_path):
    from datasets.data_files import resolve_pattern

    (file := tmp_path / "a[1]" / "x.parquet").parent.mkdir()
    file.touch()
    for name, folder in ((str(file), "/"), ("x.parquet", file.parent)):
        cfg = compose("train", f"data.train_files={quoted(name)}")
        with chdir(folder):
            [wanted] = start.as_verl_wants(cfg, {})["data"]["train_files"]
            assert resolve_pattern(wanted, str(folder)) == [str(file)]
    assert start.as_pattern("data/tiny/train.parquet") == "data/tiny/train.parquet"


def test_a_log_gets_lines_whatever_force_color_says_and_a_full_disk_below_it_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(Console(), RunFolder(tmp_path), 0, 1):
        pass
    assert re.fullmatch(r"[\d:]+ starting Ray.*\n+", capsys.readouterr().out)
    with suppress(OSError), Path("/dev/full").open("w", encoding="utf-8") as full:
        with Progress(Console(file=full), RunFolder(tmp_path), 0, 1) as progress:
            progress.say("on a full disk")
        went_on = True
    assert went_on


def test_a_reward_that_is_not_finite_is_shown(tmp_path):
    said = Console(file=StringIO(), width=100)
    with Progress(said, RunFolder(tmp_path), 0, 1) as progress:
        append_line(progress.events.path, {"event": "generating", "split": "train", "step": 1})
        data = {"training/global_step": 1, "critic/score/mean": None, "reward/acc": 0.5, "response_length/mean": 9.0}
        append_line(progress.metrics.path, {"step": 1, "data": data | {"timing_s/step": 1.0}})
        progress.update()
    assert "reward not finite, right 50%, 9 tokens" in said.file.getvalue()
