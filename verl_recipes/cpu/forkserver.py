"""A `python` that starts in milliseconds, because verl, torch and vLLM are already imported.

A run on a CPU starts some twenty processes, mostly one after another, and each would spend ten seconds on much the same
imports (docs/performance.md). The process that becomes verl's driver imports all that does not need Ray, and forks a
server. An executable that takes the arguments of `python` (run/supervise.py, start_forkserver) asks the server for a
fork, which goes on with these arguments and with the caller's environment, folder and open files. With that executable
Ray starts its services (the driver's `sys.executable`) and its workers (the `runtime_env.py_executable`), and vLLM its
engine (`multiprocessing.set_executable`). If the server is gone or has failed, the executable becomes the real Python,
and the run is slower and nothing else.

This file is both sides. The executable runs it by path, without site-packages, and imports very little.
"""

import json
import os
import select
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

HEADER = struct.Struct("!I")
FILES = 250  # Linux passes 253 in one message
WORKER = "RAY_JOB_ID"  # environment variable that Ray's raylet sets for the workers that it starts
# What the driver, the trainer, a training worker, vLLM's server and its engine import. Ray reads its job's environment
# when it is loaded (the job and the raylet's process, ray_internal_flag_def.h), and the first worker brings that.
BEFORE_RAY = (
    *("pandas", "pyarrow", "torch", "transformers", "tensordict", "datasets", "peft"),
    "vllm.entrypoints.openai.api_server",
)
WITH_RAY = (
    "ray._private.workers.default_worker",
    "verl.trainer.main_ppo",
    "verl.trainer.ppo.v1",
    "verl.workers.rollout.vllm_rollout.vllm_async_server",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen2",
    "verl_recipes.cpu.batch_rollout",
    "verl_recipes.cpu.engine",
    "verl_recipes.cpu.worker_extension",
    "verl_recipes.in_verl.sampler",
)


def ask(path: str, arguments: list[str]) -> None:
    """The executable: let the server fork, wait for the child, and end as it does. Returns if there is no server."""
    files = [fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")]
    if len(files) > FILES:
        return
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "files": files}
        body = json.dumps(request).encode()
        socket.send_fds(connection, [HEADER.pack(len(body))], files)
        connection.sendall(body)
        answer = connection.recv(HEADER.size, socket.MSG_WAITALL)
    except OSError:
        return
    if len(answer) < HEADER.size:  # it died before it forked
        return
    (child,) = HEADER.unpack(answer)
    for fd in files:  # so that the other ends notice when the child ends
        if fd > 2:
            os.close(fd)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, _: os.kill(child, number))
    status = connection.recv(HEADER.size, socket.MSG_WAITALL)
    if len(status) < HEADER.size:  # the server was killed, and the fork goes on
        with suppress(ProcessLookupError):
            select.select([os.pidfd_open(child)], [], [])
        os._exit(1)
    code = os.waitstatus_to_exitcode(HEADER.unpack(status)[0])
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request, and its open files under new numbers."""
    header, files, _, _ = socket.recv_fds(connection, HEADER.size, FILES)
    try:
        (length,) = HEADER.unpack(header)
        return json.loads(connection.recv(length, socket.MSG_WAITALL)), files
    except (OSError, ValueError, struct.error):
        for fd in files:
            os.close(fd)
        raise


def end_with_parent() -> None:
    """End this process when its parent ends; a fork does not inherit that."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG (linux/prctl.h)


def become(request: dict[str, Any], files: list[int]) -> None:
    """In the fork: take over the caller's files, environment and folder, and run its arguments."""
    import fcntl

    wanted = request["files"]
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, max(wanted) + 1) for fd in files]  # above every number that is needed
    os.closerange(3, max(wanted) + 1)
    for source, target in zip(high, wanted, strict=True):
        os.dup2(source, target, inheritable=True)
    os.closerange(max(wanted) + 1, 65536)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if "ray" not in sys.modules:  # one of Ray's services, which would outlive the driver
        end_with_parent()
    import torch

    # Repeat what these libraries read from the environment when they were imported.
    import_module("ray._raylet").Config.initialize("")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    torch._dynamo.config.disable = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
    run(request["arguments"])


def run(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does, without the interpreter's own options."""
    import runpy

    rest = list(arguments)
    while rest[0].startswith("-") and rest[0] not in ("-c", "-m"):
        rest = rest[2:] if rest[0] in ("-X", "-W") else rest[1:]
    if rest[0] == "-c":
        import __main__

        sys.argv = ["-c", *rest[2:]]
        sys.path.insert(0, "")
        exec(rest[1], __main__.__dict__)
    elif rest[0] == "-m":
        sys.argv = rest[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = rest
        sys.path.insert(0, os.path.dirname(os.path.abspath(rest[0])))
        runpy.run_path(rest[0], run_name="__main__")


@contextmanager
def rays_numbers_untouched() -> Iterator[None]:
    """Import modules without a draw from Ray's random numbers, of whose state every fork has a copy.

    Ray's ids come from them. It draws one for every class that becomes an actor's, as some of verl's do when they are
    imported. After that, two forks would give their tasks the same ids, and an actor that gets two tasks of one id dies
    ("Check failed: erased == 1").
    """
    from types import SimpleNamespace

    actor: Any = import_module("ray.actor")
    kind = actor.ActorClassID
    actor.ActorClassID = SimpleNamespace(from_random=lambda: kind(os.urandom(kind.size())))
    yield
    actor.ActorClassID = kind


def load(names: tuple[str, ...]) -> None:
    """Import modules, and keep collections of garbage in the forks from copying every page.

    Collections meanwhile would take a fifth of the time and find next to nothing.
    """
    import gc

    gc.disable()
    for name in names:
        import_module(name)
    gc.collect()
    gc.freeze()
    gc.enable()


def serve(server: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for every caller; who comes before the imports are done waits. Returns in a fork: what it is to become."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who run something
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if isinstance(key.fileobj, int):  # a child has ended: send its status to the caller
                child, connection = key.data
                selector.unregister(key.fileobj)
                os.close(key.fd)
                _, status = os.waitpid(child, 0)
                if connection in selector.get_map():
                    selector.unregister(connection)
                with connection, suppress(OSError):  # the caller may have been killed
                    connection.sendall(HEADER.pack(status))
                continue
            if key.fileobj is not server:  # a caller was killed, and Ray waits until what its child holds is closed
                if key.fileobj.fileno() >= 0:  # not of a child that has just ended
                    selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
                continue
            connection, _ = server.accept()
            try:
                request, files = receive(connection)
            except (OSError, ValueError, struct.error):  # the caller was killed while it asked
                continue
            if "ray" not in sys.modules and WORKER in request["environment"]:
                os.environ.update(request["environment"])
                with rays_numbers_untouched():
                    load(WITH_RAY)
                # For vLLM's engine: Ray brings a copy of this library, and only one of the two finds a process's title.
                sys.modules["setproctitle"] = sys.modules["ray._raylet"]
            child = os.fork()
            if child == 0:
                selector.close()
                return request, files
            for fd in files:
                os.close(fd)
            try:
                connection.sendall(HEADER.pack(child))
            except OSError:  # the caller was killed, as Ray does with workers that take too long to start
                os.kill(child, signal.SIGKILL)
            selector.register(os.pidfd_open(child), selectors.EVENT_READ, (child, connection))
            selector.register(connection, selectors.EVENT_READ, child)


def fork_server(server: socket.socket, python: str, arguments: list[str]) -> None:
    """Fork the server, and go on as `python ARGUMENTS`."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARN")  # verl's, for its workers; vLLM reads it when it is imported
    load(BEFORE_RAY)
    if os.fork():
        server.close()  # otherwise a caller would wait for an answer where the server is gone
        sys.executable = python
        run(arguments)
        return
    end_with_parent()
    become(*serve(server))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        fork_server(socket.socket(fileno=int(sys.argv[2])), sys.argv[3], sys.argv[4:])
    else:  # the executable
        ask(sys.argv[1], sys.argv[2:])
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
