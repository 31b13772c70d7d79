"""Commands that tests start for real, and what they leave behind."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress

import psutil

from data_prep.cli import CONFIGS, quoted
from verl_recipes.run.supervise import abandoned_scratch, mapped_segments, segments

ROOT = CONFIGS.parent
MARK = "COUNTDOWN_ZERO_TEST"  # an environment variable by which a test knows the processes that it caused
SHORT = ["data.train_batch_size=8", "data.max_response_length=64", "eval_n=2"]
RESUMED = [*SHORT, "trainer.total_training_steps=4", "trainer.save_freq=2", "data.train_max_samples=16"]


def temporary_files():
    """The shared-memory segments and the scratch folders that no living process has: other runs may be going on."""
    return {*abandoned_scratch(), *(segments() - mapped_segments(psutil.pids()))}


class Command:
    """A command in a session of its own, and what it left behind."""

    def __init__(self, *arguments):
        self.mark, self.files = uuid.uuid4().hex, temporary_files()
        self.process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=os.environ | {MARK: self.mark, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `sh -c "... &"` has it ignored
        )
        atexit.register(self.end)  # Ctrl-C on the tests does not reach its session

    def wait(self, timeout=900):
        """The exit status; what was printed is then in `output`. One that hangs is killed with all that it started."""
        try:
            self.output = self.process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode

    def end(self):
        if self.process.poll() is None:
            self.kill()

    def kill(self):
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def wait_for(self, condition, timeout=600):
        """Until the condition holds, while the command runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError("timed out")
            time.sleep(0.2)

    def processes(self):
        """Processes that carry the mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_for_processes(self, timeout=60):
        """Until none of the command's processes is left: those of a killed one end by themselves."""
        deadline = time.monotonic() + timeout
        while left := self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)

    def assert_nothing_is_left(self, patience=60):
        """No process, and with them no Ray session; no shared-memory segment, no folder of temporary files.

        What another test's killed run left is removed by that run's next start, so it is waited for.
        """
        deadline = time.monotonic() + patience
        while (left := [*self.processes(), *(temporary_files() - self.files)]) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not left, left


def train(run_dir, *overrides):
    return Command(sys.executable, "-m", "verl_recipes.train", f"run_dir={quoted(run_dir)}", "force=true", *overrides)


def titles(command):
    """The processes of a command that is going on, each with the first word of its command line."""
    found = {}
    for process in command.processes():
        with suppress(psutil.Error, IndexError):  # it ended in between
            found[process] = process.cmdline()[0].split(".")[0]
    return found


def workers_of(command):
    return [process for process, title in titles(command).items() if title.startswith("ray::WorkerDict")]


def listeners(command):
    """Title of the process, and address, of every socket of a command that waits for connections."""
    found = []
    for process, title in titles(command).items():
        with suppress(psutil.Error):
            sockets = process.net_connections("tcp")
            found += [(title, each.laddr.ip) for each in sockets if each.status == psutil.CONN_LISTEN]
    return found


def metrics_of(run_dir, name="metrics.jsonl"):
    """The lines that are whole: the run may be going on."""
    path = run_dir / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
