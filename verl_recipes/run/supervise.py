"""Runs verl in a process of its own, keeps its output in a file, and leaves nothing behind.

verl, Ray and vLLM start a dozen processes and print thousands of lines. The command that a person typed stays light: it
starts verl, tells what it is doing, and afterwards, whatever happened, ends every process that it caused and removes
Ray's session folder and the shared-memory segments.
"""

import ctypes
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from verl_recipes.run.cluster import in_job
from verl_recipes.run.folder import RunFolder
from verl_recipes.settings.configuration import PYTHON

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
# The folder of everything temporary of a run. Ray's sockets lie below it, and a socket's path has at most 107 bytes, of
# which they take 106 where process numbers have seven digits. So the name is short, and TMPDIR is not asked.
TEMPORARY, SCRATCH = Path("/tmp"), "czero-"
# Ray starts a cluster of its own and joins none that runs here for others; and, as on Windows and macOS, all of it
# listens on the loopback address alone. A job of a cluster joins that one.
LOCAL = {"RAY_ADDRESS": "local", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# verl waits for ever for an engine that dies while it gets weights, and for the responses of an agent loop that died.
WATCHED = ("VLLM::EngineCore", "ray::AgentLoopWorker")
DEAD = 60  # seconds; at the end of a run these end some seconds before it does
SEGMENTS = ("psm_", "verl_weights_", "sem.mp-")  # multiprocessing's and verl's names in /dev/shm


def run_verl(run: RunFolder, environment: dict[str, str], watch: Callable[[], None], notice: float = 0) -> int:
    """Run `python -m verl.trainer.main_ppo` on the folder's verl.yaml until it ends; its log receives all output.

    Args:
        run: the folder.
        environment: added to this process's own.
        watch: called about five times a second; it shows the progress.
        notice: seconds that verl gets to end by itself after SIGTERM, told by the file `stop`
            (verl_recipes/in_verl/sampler.py).

    Returns:
        verl's exit status; 1 where one of the processes WATCHED died. Any exception, Ctrl-C and SIGTERM included, ends
        verl before it goes on.
    """
    where = [
        f"--config-path={run.path.resolve()}",
        f"--config-name={run.verl_config.stem}",
        "hydra.run.dir=.",
        "hydra.output_subdir=null",
    ]
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *where, *quiet]
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of verl's become children of this process, where they are found
    remove_what_the_killed_left()
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-", dir=TEMPORARY))
    (scratch / "segments").write_text("\n".join(path.name for path in segments()))
    # All temporary files go with the folder.
    environment = os.environ | environment | {name: str(scratch) for name in ("RAY_TMPDIR", "TMPDIR")}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0"} | ({} if in_job() else LOCAL)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    deadline, stop = float("inf"), run.stop
    watched: dict[psutil.Process, tuple[str, float]] = {}
    stop.unlink(missing_ok=True)

    def terminated(*_: object) -> None:
        nonlocal deadline
        stop.touch()
        deadline = min(deadline, time.monotonic() + notice)

    signal.signal(signal.SIGTERM, terminated)
    try:
        with run.log.open("a", encoding="utf-8") as output:

            def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # not to outlive this process
                    **options,
                )

            if environment.get("VERL_PLATFORM") == "cpu" and not in_job():
                python = start_forkserver(scratch, start)
                environment[PYTHON] = str(python)
                command.append(f"++ray_kwargs.ray_init.runtime_env.py_executable={python}")
            verl = start(command)
        for look in count():
            if verl.poll() is not None or time.monotonic() > deadline:
                break
            if look % 25 == 0 and (name := who_died(watched)):
                with run.log.open("a", encoding="utf-8") as output:
                    output.write(f"RuntimeError: {name} died, and verl would wait for it without end\n")
                break
            watch()
            time.sleep(0.2)
        if stop.exists():
            sys.exit(128 + signal.SIGTERM)
        return 1 if verl.returncode is None else verl.returncode
    finally:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)  # whoever asks twice shall not cut the cleaning short
        stop.unlink(missing_ok=True)
        end_descendants()
        remove(scratch)
        for each, handler in handlers.items():
            signal.signal(each, handler)


def who_died(watched: dict[psutil.Process, tuple[str, float]]) -> str:
    """The name of a process of WATCHED, below this one, that has been gone for DEAD seconds; "" for none.

    Args:
        watched: the name of each, and when it was last seen; this function keeps it.
    """
    now = time.monotonic()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if name := next(filter(title.startswith, WATCHED), ""):
                watched[process] = name, now
    return next((name for name, seen in watched.values() if now - seen > DEAD), "")


def start_forkserver(scratch: Path, start: Callable[..., Any]) -> Path:
    """Start the server of cpu/forkserver.py with `start`, and return the executable that asks it for processes."""
    python, address = scratch / "python", scratch / "python.socket"
    program = str(Path(__file__).parent.parent / "cpu" / "forkserver.py")
    ask = shlex.join([sys.executable, "-IS", program, str(address)])
    python.write_text(f'#!/bin/sh\nexec {ask} "$@"\n')
    python.chmod(0o755)
    with socket.create_server(str(address), family=socket.AF_UNIX, backlog=64) as server:
        start([sys.executable, "-P", program, "--serve", str(server.fileno())], pass_fds=[server.fileno()])
    return python


def end_descendants(patience: float = 10) -> None:
    """End every process that this one caused: SIGTERM, and SIGKILL after `patience` seconds."""
    for send in (psutil.Process.terminate, psutil.Process.kill):
        remaining = psutil.Process().children(recursive=True)
        for process in remaining:
            with suppress(psutil.NoSuchProcess):
                send(process)
        psutil.wait_procs(remaining, timeout=patience)


def remove_what_the_killed_left() -> None:
    """Remove the scratch folders, and the segments, of runs that were killed before they could do it themselves."""
    for scratch in TEMPORARY.glob(f"{SCRATCH}*"):
        name = re.fullmatch(rf"{SCRATCH}(\d+)-.*", scratch.name)
        if name and not psutil.pid_exists(int(name[1])):
            remove(scratch)


def segments() -> list[Path]:
    """The shared-memory segments of this user that bear one of the names."""
    found = []
    for path in Path("/dev/shm").iterdir():
        with suppress(FileNotFoundError):  # it went in between
            if path.name.startswith(SEGMENTS) and path.stat().st_uid == os.getuid():
                found.append(path)
    return found


def remove(scratch: Path) -> None:
    """Remove a run's scratch folder, and the segments that were not there before it and that no process maps."""
    with suppress(OSError):  # somebody else's, or cut short
        before = (scratch / "segments").read_text().splitlines()
        mapped = mapped_segments()
        for path in segments():
            if path.name not in before and str(path) not in mapped:
                path.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)


def mapped_segments() -> set[str]:
    """The paths below /dev/shm that a living process maps."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it went in between, or is somebody else's
            mapped |= set(re.findall(r"/dev/shm/\S+", maps.read_text()))
    return mapped
