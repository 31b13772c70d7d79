"""Runs verl in a process of its own, writes its output to a file, and cleans up afterwards.

verl, Ray and vLLM start a dozen processes and print thousands of lines. The command that a person typed stays light: it
starts verl and shows the progress. At the end, whatever happened, it kills every process that it caused, and removes
Ray's session folder and the shared-memory segments.
"""

import ctypes
import fcntl
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import psutil

from data_prep.cli import quoted
from verl_recipes.run.cluster import in_job
from verl_recipes.run.folder import RunFolder
from verl_recipes.settings.configuration import PYTHON

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
# All temporary files of a run are in one folder here. Ray's sockets are in it too: a socket's path has at most 107
# bytes, and Ray's have 106 if process numbers have seven digits. So the name is short, and TMPDIR is ignored.
TEMPORARY, SCRATCH = Path("/tmp"), "czero-"
TEMPORARIES = ("RAY_TMPDIR", "TMPDIR", "HF_DATASETS_CACHE")  # verl loads parquet by datasets, which copies it
# Files in it: locked as long as the run goes on, and the names of its segments.
LOCK, NOTED = "scratch.lock", "segments"
# Ray starts a cluster of its own instead of joining one that runs on this machine, and listens on the loopback address
# alone, as it does on Windows and macOS.
LOCAL = {
    "RAY_ADDRESS": "local",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, its workers take this Python too
}
# A tracker's mode comes with a job and from its configuration; Ray refuses a name that is in both.
JOB = {"RAY_OVERRIDE_JOB_RUNTIME_ENV": "1"}
# A cluster may set all of these. verl refuses the first two beside the third, against which Ray counts logical GPUs.
HIDDEN = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
ENGINE = "VLLM::EngineCore"  # verl waits for ever for one that dies while it receives weights
DEAD = 60  # seconds; at a normal end engines stop only some seconds before verl
# verl waits for ever for room in Ray as well. A start on two cores takes half of this, so Ray is rarely asked.
ROOM = 90  # seconds from the start until Ray is asked what is pending; the same answer twice, so far apart, ends verl
SHARED = Path("/dev/shm")
SEGMENTS = ("psm_", "verl_weights_", "sem.mp-")  # multiprocessing's and verl's names there
PPO, SFT = "verl.trainer.main_ppo", "verl_recipes.in_verl.sft"  # entries of verl's two trainers


def run_verl(
    run: RunFolder, environment: dict[str, str], watch: Callable[[], None], notice: float = 0, trainer: str = PPO
) -> int:
    """Run `python -m TRAINER` on the folder's verl.yaml until it ends; its log receives all output.

    Args:
        environment: added to this process's own.
        watch: called about five times a second; it shows the progress.
        notice: seconds that verl gets to end by itself after SIGTERM, if any; after SIGHUP, from a terminal that was
            closed, it gets what it needs. The file `stop` asks it to (verl_recipes/in_verl/sampler.py).
        trainer: the entry of one of verl's trainers.

    Returns:
        verl's exit status; 1 if verl would have waited for ever: an engine of vLLM died, or Ray has no room for the
        run. Any exception, Ctrl-C and SIGTERM included, first ends verl.
    """
    where = [f"--config-path={run.path.resolve()}", f"--config-name={run.verl_config.stem}"]
    quiet = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    command, deadline = ["-m", trainer, *where, *quiet], float("inf")

    def terminated(*_: object) -> None:
        nonlocal deadline
        run.stop.touch()
        deadline = min(deadline, time.monotonic() + notice)

    def hung_up(*_: object) -> None:
        leave_terminal()
        run.stop.touch() if notice else terminated()  # nobody kills what a terminal left behind

    run.stop.unlink(missing_ok=True)
    try:
        with scratch_folder() as scratch, run.log.open("a", encoding="utf-8") as output:
            signal.signal(signal.SIGTERM, terminated)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as `nohup` has it
                signal.signal(signal.SIGHUP, hung_up)
            environment = within(scratch, os.environ | environment)
            begin = partial(start, environment=environment, output=output)
            executes = not os.statvfs(scratch).f_flag & os.ST_NOEXEC  # else without the fork server: slower, no more
            if environment.get("VERL_PLATFORM") == "cpu" and not in_job() and executes:
                environment[PYTHON] = python = str(scratch / "python")
                command.append(f"++ray_kwargs.ray_init.runtime_env.py_executable={python}")
                verl = start_forkserver(Path(python), begin, command)
            else:
                python = shlex.quote(sys.executable)  # Ray gives it to bash as it is
                if python != sys.executable and not in_job():
                    command.append(f"++ray_kwargs.ray_init.runtime_env.py_executable={quoted(python)}")
                verl = begin([sys.executable, *command])
            already = written(run)
            is_late, is_going = lambda: time.monotonic() > deadline, lambda: written(run) > already
            if why := wait_for_end(verl, scratch, watch, is_late, is_going):
                output.write(f"RuntimeError: {why}\n")
            if run.stop.exists():
                sys.exit(128 + signal.SIGTERM)
            return 1 if verl.returncode is None else verl.returncode
    finally:
        run.stop.unlink(missing_ok=True)


def within(scratch: Path, environment: dict[str, str]) -> dict[str, str]:
    """The environment of a start, whose temporary files are removed with the scratch folder."""
    # Ray's own token would be a file in the home, which others may read, or which cannot be written.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0"} | (JOB if in_job() else LOCAL | token)
    hidden = HIDDEN if environment.get("VERL_PLATFORM") == "cpu" else HIDDEN[:2]
    temporary = {name: str(scratch) for name in TEMPORARIES}
    return {name: value for name, value in environment.items() if name not in hidden} | temporary


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A scratch folder for one start of verl. At the end, kill every process that this one caused and clean up.

    A second signal does not interrupt the cleanup.
    """
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)  # verl's orphans become children of this process, so it finds them
    for abandoned in abandoned_scratch():
        remove(abandoned)
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-", dir=TEMPORARY))
    lock = lock_scratch(scratch)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield scratch
    finally:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)
        signal_descendants(signal.SIGSTOP)  # so that no new segment appears after this list
        note_segments(scratch)
        end_descendants()
        remove(scratch)
        lock.close()
        for each, handler in handlers.items():
            signal.signal(each, handler)


def leave_terminal() -> None:
    """Print to nowhere: every write to a terminal that is gone, or to a pipe whose reader ended with it, fails."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if not stat.S_ISREG(os.fstat(stream).st_mode):
            os.dup2(nothing, stream)


def end_with_parent(by: int = signal.SIGTERM) -> None:
    """In a child: get this signal once the parent has ended, however that was."""
    LIBC.prctl(PR_SET_PDEATHSIG, by)


def protect() -> None:
    """In a child: end with the parent, and ignore the SIGTERM that a scheduler sends to every process of a run."""
    end_with_parent(signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # what the child starts inherits it


def start(
    command: list[str], *, environment: dict[str, str], output: TextIO, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a child that neither Ctrl-C nor a signal to this process's group reaches."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=protect, **streams, **options)


def size_of(path: Path) -> int:
    """A file's size in bytes, 0 if there is none."""
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def written(run: RunFolder) -> int:
    """Bytes by which a trainer shows that it works."""
    return size_of(run.events) + size_of(run.metrics_part)


def wait_for_end(
    verl: subprocess.Popen[bytes],
    scratch: Path,
    watch: Callable[[], None],
    is_late: Callable[[], bool],
    is_going: Callable[[], bool],
) -> str:
    """Wait until verl ends or is late, or would wait for ever. Returns why it would, "" if it would not.

    Args:
        is_going: whether its first rollouts have begun, or its first step is done.
    """
    engines: dict[psutil.Process, float] = {}
    asked = [(time.monotonic(), "")]
    others = pending() if in_job() else ""  # what other programs of the cluster wait for
    for look in count():
        if verl.poll() is not None or is_late():
            break
        if look % 5 == 0:  # every second, as what was never seen is not missed: an engine, a segment
            note_segments(scratch)
            if an_engine_died(engines):
                return f"{ENGINE} died, and verl would wait for it for ever"
        if look % 25 == 0 and not is_going() and (lack := what_lacks(asked, others)):
            return lack
        end_services(verl.pid)
        watch()
        time.sleep(0.2)
    return ""


def an_engine_died(engines: dict[psutil.Process, float]) -> bool:
    """Whether an engine of vLLM, a descendant of this process, has been gone for DEAD seconds.

    Args:
        engines: when each was last seen. This function updates it.
    """
    now = time.monotonic()
    for process in psutil.Process().children(recursive=True):
        if " ".join(cmdline_of(process)).startswith(ENGINE):
            engines[process] = now
    return any(now - seen > DEAD for seen in engines.values())


def what_lacks(asked: list[tuple[float, str]], others: str = "") -> str:
    """What Ray has no room for, now and ROOM seconds ago; "" for nothing.

    Args:
        asked: when Ray was asked and its answers, with the start of verl first; this function keeps it.
        others: its answer before verl asked for anything.
    """
    since, before = asked[-1]
    if time.monotonic() - since < ROOM:
        return ""
    asked.append((time.monotonic(), said := pending()))
    advice = "" if in_job() else "; these CPUs are logical, and ray_kwargs.ray_init.num_cpus= raises them"
    is_ours = said.partition(":")[0] != others.partition(":")[0]
    return f"{said}, and verl would wait for ever{advice}" if said and said == before and is_ours else ""


def pending() -> str:
    """The line of run/pending.py for this run's Ray, asked in a process of its own; "" also if there is no answer."""
    address, environment = (os.environ.get("RAY_ADDRESS", ""), dict(os.environ)) if in_job() else own_ray()
    if address:
        command = [sys.executable, "-m", "verl_recipes.run.pending", address]
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=60)
            return done.stdout.strip()
    return ""


def own_ray() -> tuple[str, dict[str, str]]:
    """The address of the Ray that runs below this process, "" for none; and its raylet's environment, for its token."""
    for process in psutil.Process().children(recursive=True):
        line = " ".join(cmdline_of(process))
        if match := re.search(r"raylet\b.* --gcs-address=(\S+)", line):
            with suppress(psutil.Error):
                return match[1], process.environ()
    return "", {}


def cmdline_of(process: psutil.Process) -> list[str]:
    """Its command line; [] if it has ended."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def start_forkserver(
    python: Path, start: Callable[..., subprocess.Popen[bytes]], arguments: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Start `python ARGUMENTS` with `start`; it forks the server of cpu/forkserver.py first.

    Args:
        python: becomes the executable that asks the server for processes.
    """
    address = python.with_suffix(".socket")
    program = str(Path(__file__).parent.parent / "cpu" / "forkserver.py")
    # -I ignores PYTHONUTF8, which the server has.
    ask = shlex.join([sys.executable, "-IS", "-X", "utf8", program, str(address)])
    python.write_text(f'#!/bin/sh\nexec {ask} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    with socket.create_server(str(address), family=socket.AF_UNIX, backlog=64) as server:
        command = [sys.executable, "-P", program, "--serve", str(server.fileno()), str(python), *arguments]
        return start(command, pass_fds=[server.fileno()])


def is_terminated(pid: int) -> bool:
    """Whether a process that blocks SIGTERM has received one."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (pending,) = re.findall(r"^ShdPnd:\s*(\w+)$", status, re.MULTILINE)
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


def end_services(verl: int) -> None:
    """Kill the services that Ray is ending: they block its SIGTERM, and Ray would wait a second for each.

    If verl's own process has received a SIGTERM too, it came from a scheduler, and nothing is killed.
    """
    with suppress(psutil.Error, OSError):  # a process may end meanwhile
        # psutil would look at every process of the machine, five times a second.
        files = Path(f"/proc/{verl}/task").glob("*/children")
        children = " ".join(each.read_text(encoding="utf-8") for each in files).split()
        if services := [psutil.Process(int(each)) for each in children if is_terminated(int(each))]:
            time.sleep(0.1)  # a scheduler signals all processes within less time
            for each in services if not is_terminated(verl) else ():
                each.kill()


def signal_descendants(number: int) -> list[psutil.Process]:
    """Send a signal to every descendant of this process; returns them."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        with suppress(psutil.Error):  # it has ended meanwhile
            process.send_signal(number)
    return processes


def end_descendants() -> None:
    """Kill every descendant, wait up to ten seconds for the end, and repeat it once."""
    for _ in range(2):  # a process may have started another one meanwhile
        psutil.wait_procs(signal_descendants(signal.SIGKILL), timeout=10)


def lock_scratch(scratch: Path) -> TextIO:
    """Mark a scratch folder as in use, until the returned file is closed or this process ends."""
    new = scratch / f"{LOCK}.new"
    lock = new.open("w", encoding="utf-8")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (scratch / LOCK).hardlink_to(new)  # so the file LOCK is locked from its first moment
    return lock


def abandoned_scratch() -> list[Path]:
    """The scratch folders of runs that were killed before they could remove them."""
    found = []
    for lock in TEMPORARY.glob(f"{SCRATCH}*/{LOCK}"):
        with suppress(OSError):  # its run still goes on, or has just removed it
            if lock.parent.lstat().st_uid != os.getuid():  # that user's next run removes the segments too
                continue
            with lock.open(encoding="utf-8") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(lock.parent)
    return found


def segments() -> set[str]:
    """The names of this user's shared-memory segments that begin with one of SEGMENTS."""
    found = set()
    for path in SHARED.iterdir():
        with suppress(FileNotFoundError):  # it was removed meanwhile
            if path.name.startswith(SEGMENTS) and path.stat().st_uid == os.getuid():
                found.add(path.name)
    return found


def mapped_segments(processes: Iterable[int]) -> set[str]:
    """The names of the shared-memory segments that these processes map."""
    mapped: set[str] = set()
    for process in processes:
        with suppress(OSError):  # the process has ended, or belongs to another user
            maps = Path(f"/proc/{process}/maps").read_text(encoding="utf-8", errors="replace")
            mapped |= set(re.findall(rf"{SHARED}/(\S+)", maps))
    return mapped


def note_segments(scratch: Path) -> None:
    """Record in the scratch folder which segments this run's processes map, as only those may be removed."""
    noted, there = noted_segments(scratch), segments()
    if new := there - noted:
        ours = mapped_segments(each.pid for each in psutil.Process().children(recursive=True))
        # Each step makes new ones, so those that are gone are forgotten.
        (scratch / NOTED).write_text("\n".join((noted & there) | (new & ours)), encoding="utf-8")


def noted_segments(scratch: Path) -> set[str]:
    file = scratch / NOTED
    return set(file.read_text(encoding="utf-8").split()) if file.exists() else set()


def remove(scratch: Path) -> None:
    """Remove a run's scratch folder and its segments, except those that a process still maps."""
    if ours := noted_segments(scratch) & segments():
        for name in ours - mapped_segments(psutil.pids()):
            (SHARED / name).unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
