"""The executable that stands for `python` on a CPU (verl_recipes/cpu/forkserver.py): forks with the imports done."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from verl_recipes.cpu.forkserver import HEADER
from verl_recipes.run.supervise import start_forkserver

pytestmark = pytest.mark.end_to_end
ENVIRONMENT = os.environ | {"VERL_PLATFORM": "cpu"}
WORKER = ENVIRONMENT | {"RAY_JOB_ID": "01000000"}  # as Ray starts a worker
SLEEP = ["-c", "import time; time.sleep(600)"]
TELL = """
import json, os, sys
fd = int(sys.argv[2])
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "variable": os.environ.get("ONLY_HERE"), "input": sys.stdin.read(),
    "file": os.read(fd, 100).decode(), "vllm": "vllm.v1.engine.core" in sys.modules,
}))
print("an error", file=sys.stderr)
sys.exit(7)
"""


@contextmanager
def serving():
    """The executable, verl's driver (here it only waits), the server, and a fork as one of Ray's services is one."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    tell = "import os, sys; print(os.getpid(), sys.argv, sys.executable, flush=True); sys.stdin.read()"
    quiet, pipe = ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "ERROR"}, subprocess.PIPE
    start = partial(subprocess.Popen, env=quiet, stdin=pipe, stdout=pipe, text=True)
    driver = start_forkserver(folder / "python", start, ["-c", tell, "a b"])
    assert driver.stdout.readline() == f"{driver.pid} ['-c', 'a b'] {folder / 'python'}\n"
    code = "import time; print('started', flush=True); time.sleep(600)"
    service = subprocess.Popen([folder / "python", "-c", code], env=ENVIRONMENT, stdout=pipe, text=True)
    # If a worker came first, it would load Ray, and the service would live on.
    assert service.stdout.readline() == "started\n"
    try:
        yield folder / "python", driver, psutil.Process(driver.pid).children()[0], service
    finally:
        driver.kill()
        driver.wait()
        service.wait(timeout=120)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server():
    with serving() as parts:
        yield parts


def told(python, folder):
    """What a process started with `python` says of itself."""
    reading, writing = os.pipe()
    os.write(writing, b"from the pipe")
    environment = WORKER | {"ONLY_HERE": "x y"}
    command = [python, "-u", "-X", "utf8", "-c", TELL, "a b", str(reading)]
    done = subprocess.run(
        command, cwd=folder, env=environment, input="typed", pass_fds=[reading], capture_output=True, text=True
    )
    os.close(reading)
    os.close(writing)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.pop("arguments") == ["-c", "a b", str(reading)]
    assert done.stderr.endswith("an error\n")
    return said | {"status": done.returncode}


def test_a_process_is_as_python_itself_starts_it_but_for_the_imports_that_are_done(server, tmp_path):
    real, forked = (told(python, tmp_path) for python in (sys.executable, server[0]))
    assert real | {"vllm": True} == forked
    assert (forked["file"], forked["status"], forked["folder"]) == ("from the pipe", 7, str(tmp_path))


def test_a_signal_passes_through_the_executable_in_both_directions(server):
    loop = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
    for send, target in ((signal.SIGTERM, "executable"), (signal.SIGKILL, "fork")):
        process = subprocess.Popen([server[0], "-c", loop], env=WORKER, stdout=subprocess.PIPE, text=True)
        fork = int(process.stdout.readline())
        assert fork != process.pid
        os.kill({"executable": process.pid, "fork": fork}[target], send)
        assert process.wait(timeout=120) == -send
        with pytest.raises(ProcessLookupError):
            os.kill(fork, 0)


def test_two_forks_draw_different_ids_from_rays_random_numbers(server):
    """From those of one state two agent loop workers would give their tasks one id, and vLLM's servers would die."""
    code = "from ray import WorkerID; print(WorkerID.from_random().hex())"
    environment = os.environ | {"VERL_PLATFORM": "cpu"}
    drawn = [subprocess.check_output([server[0], "-c", code], env=environment, text=True) for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_the_server_survives_callers_that_are_killed_and_ends_their_forks(server):
    python, _, process, service = server
    request = {"arguments": SLEEP, "environment": dict(os.environ), "folder": "/", "files": [2]}
    body = json.dumps(request).encode()
    for sent in (b"", HEADER.pack(len(body)), HEADER.pack(len(body)) + body):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(python.with_name("python.socket")))
            connection.shutdown(socket.SHUT_RD)  # gone for every answer, however late this process closes it
            if sent:
                socket.send_fds(connection, [sent], [2])
    assert subprocess.run([python, "-c", "pass"], env=WORKER).returncode == 0
    assert process.is_running()
    assert service.poll() is None
    deadline = time.monotonic() + 120
    while len(left := process.children()) > 1:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_fork_ends_when_its_executable_is_killed(server):
    """Ray kills an agent by its executable, and then waits until the agent's pipes are closed."""
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    executable = subprocess.Popen([server[0], "-c", code], env=WORKER, stdout=subprocess.PIPE, text=True)
    fork = psutil.Process(int(executable.stdout.readline()))
    executable.kill()
    assert executable.communicate(timeout=60)[0] == ""  # nobody holds the pipe any more
    deadline = time.monotonic() + 60  # the pipe is closed some moments before the process has ended
    while fork.is_running() and fork.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, fork
        time.sleep(0.1)


def test_without_its_server_the_executable_is_python(tmp_path):
    """Where the server ends before it has answered, and where nobody listens."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    python = folder / "python"
    try:
        sleep = start_forkserver(python, lambda command, **options: subprocess.Popen(["sleep", "2"], **options), [])
        assert told(python, tmp_path) == told(sys.executable, tmp_path)
        sleep.wait()
        time.sleep(0.1)
        assert told(python, tmp_path) == told(sys.executable, tmp_path)
    finally:
        shutil.rmtree(folder)


def test_the_server_ends_with_the_driver_and_rays_services_with_the_server_and_a_worker_ends_by_itself():
    with serving() as (python, driver, process, service):
        code = "import sys; print('started', flush=True); sys.stdin.read(); print('ended')"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        worker = subprocess.Popen([python, "-c", code], env=WORKER, text=True, **pipes)
        assert worker.stdout.readline() == "started\n"
        ended = os.pidfd_open(process.pid)  # it is no child of this process, so it may be a zombie for a while
        driver.kill()
        assert select.select([ended], [], [], 120)[0]
        os.close(ended)
        assert service.wait(timeout=120) == 1  # how a process ended, only the server could say
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=1)
        assert worker.communicate(timeout=120)[0] == "ended\n"
        assert worker.returncode == 1
