"""A tracker's server that hangs or is gone, before a run and in the midst of one; and where the keys go.

The libraries are the real ones, MLflow's server too; wandb's and SwanLab's are tests/tracker_server.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest
from configurations import compose

from data_prep.cli import CONFIGS
from verl_recipes.run import trackers as checks

ROOT = CONFIGS.parent
pytestmark = pytest.mark.slow

KEY = "5ec2e7c0de" * 4
KEYS = dict.fromkeys(("WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"), KEY)
# What the process of verl's trainer does, without the training.
TRACKED = """
import sys, time
from pathlib import Path
from verl.utils.tracking import Tracking
tracking = Tracking("project", "run", [sys.argv[1], "file"], config={"trainer": {}})
assert sys.argv[1] in tracking.logger
tracking.log({"reward/acc": 0.0}, step=0)
Path("ready").touch()
while not Path("broken").exists():
    time.sleep(0.05)
tracking.log({"reward/acc": 1.0}, step=1)
Path("logged").touch()
tracking.finish()
Path("finished").touch()
"""
# The same with the shield of a run's replay buffer. A scheduler ends wandb's service, and the step goes on to its end.
SHIELDED = """
import time
from pathlib import Path
import psutil
from verl.utils.tracking import Tracking
from verl_recipes.in_verl.trainer_link import TrainerLink
class Trainer:
    logger = Tracking("project", "run", ["wandb", "file"], config={"trainer": {}})
    def refill(self):
        pass
trainer = Trainer()
for step in range(4):
    TrainerLink({"refill_fn": trainer.refill}).shield_trackers()
    if step == 3:
        (file,) = Path("wandb").glob("offline-run-*/run-*.wandb")
        while file.stem.removeprefix("run-").encode() not in file.read_bytes():  # steps are written later
            time.sleep(0.05)
        services = psutil.Process().children(recursive=True)
        for service in services:
            service.terminate()
        for service in psutil.wait_procs(services, timeout=20)[1]:  # one that is in the middle of something
            service.kill()
    trainer.logger.log({"reward/acc": 0.5}, step=step)
print("went on", flush=True)
"""
# verl_recipes/train.py with a stand-in for verl: a shell script that does its last step, and then ends in some way.
STARTED = """
import sys
from pathlib import Path
import hydra
from rich.console import Console
from data_prep.cli import CONFIGS
from verl_recipes.run import start, supervise
from verl_recipes.run.folder import RunFolder
from verl_recipes.settings import configuration
start.SENDING, supervise.TEMPORARY, sys.executable = 1, Path.cwd(), str(Path("python").resolve())
with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
    cfg = hydra.compose("train", ["run_dir=run", "hardware=rtx4090_x1", *sys.argv[1:]])
Path("run").mkdir()
start.start_verl(cfg, RunFolder("run"), Console())
print("went on")
"""


@pytest.fixture
def address():
    """An address on loopback at which nothing answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def environment_of(address):
    return os.environ | KEYS | dict.fromkeys(("WANDB_BASE_URL", "SWANLAB_API_HOST", "MLFLOW_TRACKING_URI"), address)


@contextmanager
def serving(tracker, address, folder):
    """The process of a tracker's server, from when it answers until the end of the block."""
    port = address.rpartition(":")[2]
    command = [sys.executable, str(ROOT / "tests" / "tracker_server.py"), port]
    if tracker == "mlflow":
        store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, *store]
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, stdout=null, stderr=null, start_new_session=True)
    try:
        wait_for(lambda: checks.server_answers(address), process)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, process, timeout=120):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


@pytest.mark.parametrize("tracker", ["wandb", "swanlab", "mlflow"])
def test_a_server_that_is_gone_is_one_line_before_anything_starts(tmp_path, address, tracker):
    result = subprocess.run(
        [sys.executable, "-m", "verl_recipes.train", f"run_dir={tmp_path / 'run'}", f"tracker={tracker}"],
        cwd=ROOT,
        env=environment_of(address),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert f"tracker={tracker}: {address} does not answer; " in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "run").exists()


def test_a_server_that_takes_the_connection_and_says_nothing_does_not_answer(monkeypatch):
    monkeypatch.setattr(checks, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not checks.server_answers(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_asking_for_a_trackers_address_leaves_no_process(monkeypatch, address, tracker):
    """wandb's service did, and the run ended with its traceback."""
    for name, value in environment_of(address).items():
        monkeypatch.setenv(name, value)
    before = psutil.Process().children(recursive=True)
    assert checks.tracker_server(tracker, {f"{tracker.upper()}_MODE": "online"}) == address
    assert psutil.Process().children(recursive=True) == before


def test_a_server_that_refuses_does_answer(tmp_path, address):
    with serving("wandb", address, tmp_path):
        assert checks.server_answers(address)  # with status 501: it knows no HEAD


@pytest.mark.parametrize("address", ["postgresql://user:{}@127.0.0.1/mlflow", "https://{}@127.0.0.1/mlflow"])
def test_an_address_with_a_password_or_token_is_refused_without_printing_it(tmp_path, address):
    result = subprocess.run(
        [sys.executable, "-m", "verl_recipes.train", f"run_dir={tmp_path / 'run'}", "tracker=mlflow"],
        cwd=ROOT,
        env=os.environ | {"MLFLOW_TRACKING_URI": address.format(KEY)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "MLFLOW_TRACKING_URI holds a password" in result.stderr
    assert KEY not in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("tracker", "how"),
    [
        pytest.param("wandb", signal.SIGSTOP, id="wandb-hangs", marks=pytest.mark.long),
        pytest.param("wandb", signal.SIGKILL, id="wandb-gone", marks=pytest.mark.long),
        pytest.param("swanlab", signal.SIGSTOP, id="swanlab-hangs", marks=pytest.mark.long),
        pytest.param("swanlab", signal.SIGKILL, id="swanlab-gone"),
        pytest.param("mlflow", signal.SIGSTOP, id="mlflow-hangs", marks=pytest.mark.long),  # a minute each
        pytest.param("mlflow", signal.SIGKILL, id="mlflow-gone", marks=pytest.mark.long),
    ],
)
def test_a_server_that_dies_during_a_run_delays_no_step(tmp_path, address, tracker, how):
    """With the shipped configuration, but for wandb's minute at the end."""
    more = {"WANDB_FINISH_TIMEOUT": "2", "VERL_FILE_LOGGER_PATH": str(tmp_path / "metrics.jsonl")}
    environment = environment_of(address) | more
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        cfg = compose("train", f"tracker={tracker}", f"run_dir={tmp_path}")
        environment |= cfg.trackers[tracker].environment
    with serving(tracker, address, tmp_path) as server, (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", TRACKED, tracker]
        run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for((tmp_path / "ready").exists, run)
            os.killpg(server.pid, how)
            broken = time.monotonic()
            (tmp_path / "broken").touch()
            wait_for((tmp_path / "logged").exists, run)
            assert time.monotonic() - broken < (40 if tracker == "mlflow" else 5)
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == [0, 1]
            if tracker == "wandb":  # SwanLab waits for ever, and MLflow's end may raise: verl_recipes/train.py
                wait_for((tmp_path / "finished").exists, run)
                assert time.monotonic() - broken < 15
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()


@pytest.mark.long  # 40 s
def test_wandbs_service_that_a_scheduler_ends_costs_wandbs_lines_and_no_step_and_can_be_synced(tmp_path, address):
    """Its service takes SIGTERM although it is blocked: Go unblocks what a program asks to be told of."""
    environment = environment_of(address) | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    environment |= {"VERL_FILE_LOGGER_PATH": str(tmp_path / "metrics.jsonl")}
    command = [sys.executable, "-c", SHIELDED]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    assert "wandb misses step 3: ConnectionResetError" in run.stdout, run.stderr
    assert "went on" in run.stdout
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    with serving("wandb", address, tmp_path):
        sync = ["wandb", "sync", folder]
        done = subprocess.run(sync, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    assert "Finished syncing" in done.stdout + done.stderr


def started(tmp_path, script, *overrides):
    """train.start_verl with this shell script as verl."""
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    return subprocess.run(
        [sys.executable, "-c", STARTED, "trainer.total_training_steps=2", *overrides],
        cwd=tmp_path,
        env=os.environ | KEYS | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "SWANLAB_MODE": "local"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def step(number):
    return f"""echo '{{"step": {number}, "data": {{}}}}' >> $VERL_FILE_LOGGER_PATH"""


def test_verl_that_waits_for_a_server_after_its_last_step_is_ended_and_the_run_goes_on(tmp_path):
    result = started(tmp_path, f"{step(1)}\n{step(2)}\nsleep 600")
    assert "verl was ended: it still ran 1 s after its last step" in result.stdout, result.stderr
    assert "went on" in result.stdout


def test_verl_that_fails_after_its_last_step_is_reported_and_the_run_goes_on(tmp_path):
    result = started(tmp_path, f"{step(2)}\necho 'mlflow.MlflowException: no connection'\nexit 1")
    assert "verl's last step is done, but then: mlflow.MlflowException: no connection" in result.stdout
    assert "went on" in result.stdout


def test_verl_that_fails_before_its_last_step_ends_the_run(tmp_path):
    result = started(tmp_path, f"{step(1)}\necho 'mlflow.MlflowException: no connection'\nexit 1")
    assert "verl stopped: mlflow.MlflowException: no connection" in result.stderr
    assert "went on" not in result.stdout


def test_no_key_is_in_what_a_run_writes_before_verl_does(tmp_path):
    """Nor does verl get a key to log in with at SwanLab where nothing is to be sent."""
    show = "echo WANDB=$WANDB_API_KEY | tr 0-9a-f x; echo SWANLAB=$SWANLAB_API_KEY; "
    result = started(tmp_path, show + step(2), "tracker=[wandb,swanlab,mlflow,tensorboard]")
    assert "went on" in result.stdout, result.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"WANDB={'x' * len(KEY)}\nSWANLAB=\n" in log
    assert (tmp_path / "run" / "verl.yaml").exists()
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not holding
    assert KEY not in result.stdout + result.stderr
