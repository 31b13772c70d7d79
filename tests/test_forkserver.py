"""The executable that stands for `python` on a CPU (verl_recipes/cpu/forkserver.py): forks with the imports done."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from verl_recipes.cpu.forkserver import HEADER
from verl_recipes.run.supervise import start_forkserver

pytestmark = pytest.mark.end_to_end
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


@pytest.fixture(scope="module")
def server():
    """The executable, and the process of the server behind it."""
    folder, started = Path(tempfile.mkdtemp(dir="/tmp")), []
    environment = os.environ | {"VERL_PLATFORM": "cpu"}
    start_forkserver(
        folder, lambda command, **options: started.append(subprocess.Popen(command, env=environment, **options))
    )
    yield folder / "python", started[0]
    started[0].kill()
    started[0].wait()
    shutil.rmtree(folder)


def told(python, folder):
    """What a process started with `python` says of itself."""
    reading, writing = os.pipe()
    os.write(writing, b"from the pipe")
    environment = os.environ | {"ONLY_HERE": "x y", "VERL_PLATFORM": "cpu"}
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
    environment = os.environ | {"VERL_PLATFORM": "cpu"}
    loop = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
    for send, target in ((signal.SIGTERM, "executable"), (signal.SIGKILL, "fork")):
        process = subprocess.Popen([server[0], "-c", loop], env=environment, stdout=subprocess.PIPE, text=True)
        fork = int(process.stdout.readline())
        assert fork != process.pid
        os.kill({"executable": process.pid, "fork": fork}[target], send)
        assert process.wait(timeout=30) == -send
        with pytest.raises(ProcessLookupError):
            os.kill(fork, 0)


def test_the_server_survives_callers_that_are_killed_and_ends_their_forks(server):
    python, process = server
    arguments = ["-c", "import time; time.sleep(600)"]
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": "/", "files": [2]}
    body = json.dumps(request).encode()
    for sent in (b"", HEADER.pack(len(body)), HEADER.pack(len(body)) + body):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(python.with_name("python.socket")))
            if sent:
                socket.send_fds(connection, [sent], [2])
    assert subprocess.run([python, "-c", "pass"], env=os.environ | {"VERL_PLATFORM": "cpu"}).returncode == 0
    assert process.poll() is None
    deadline = time.monotonic() + 30
    while left := psutil.Process(process.pid).children():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_without_its_server_the_executable_is_python(tmp_path):
    """Where the server ends before it has answered, and where nobody listens."""
    folder, started = Path(tempfile.mkdtemp(dir="/tmp")), []
    try:
        python = start_forkserver(
            folder, lambda command, **options: started.append(subprocess.Popen(["sleep", "2"], **options))
        )
        assert told(python, tmp_path) == told(sys.executable, tmp_path)
        started[0].wait()
        time.sleep(0.1)
        assert told(python, tmp_path) == told(sys.executable, tmp_path)
    finally:
        shutil.rmtree(folder)


def test_a_process_outlives_its_server_and_the_executable_waits_for_it(server):
    """The last test that has the server."""
    environment = os.environ | {"VERL_PLATFORM": "cpu"}
    code = "import sys; print('started', flush=True); sys.stdin.read(); print('ended')"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([server[0], "-c", code], env=environment, text=True, **pipes)
    assert process.stdout.readline() == "started\n"
    server[1].kill()
    server[1].wait()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    assert process.communicate(timeout=30)[0] == "ended\n"
    assert process.returncode == 1  # how it ended, only the server could say
