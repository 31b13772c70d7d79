"""python benchmarks/faults.py [times [fault ...]]: injects faults into runs; nothing may be lost.

First the CASES below, once each. Then the processes of a run are killed (`kill -9`) one after another, each kind once,
some steps apart and at any moment of a step, also while a checkpoint is saved, with `trainer.restarts` set. There are
`times` (3) such runs, each in another order. Two kinds are killed a second time during the restart. `command` is the
command that a person typed; it is killed with its whole process group and typed again. The workers of verl's own agent
loop are killed in a run that uses it.

Every run is compared with an undisturbed one: the prompts of every step must be the same, every step must be there
once, and the run must end at its last step with nothing left on the machine. Adds to benchmarks/results/faults.json,
and writes the table of benchmarks/faults.md from it. A kill takes about 45 seconds on two cores. The disk (a tmpfs) and
the nodes (network namespaces) need root; the clock needs `cc`.
"""

import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from verl_recipes.run.checkpoints import last_checkpoint
from verl_recipes.run.folder import RunFolder, read_lines, read_metrics, write_whole
from verl_recipes.run.supervise import abandoned_scratch, end_with_parent

ROOT = Path(__file__).resolve().parent.parent
RUNS, TABLE = ROOT / "runs" / "faults", ROOT / "benchmarks" / "faults.md"
RECOVERED = ROOT / "benchmarks" / "results" / "faults.json"  # for each fault, the seconds until a new step
KINDS = {  # a part of the command line of such a process
    "verl's driver": "verl.trainer.main_ppo",
    "trainer": "ray::TaskRunner",
    "training worker": "ray::WorkerDict",
    "training worker, while it saves": "ray::WorkerDict",
    "vLLM's server": "ray::CPUServer",
    "vLLM's engine": "VLLM::EngineCore",
    "fork server": "forkserver.py --serve",
    "raylet": "raylet/raylet ",
    "Ray's head (GCS)": "gcs/gcs_server",
    "TransferQueue's controller": "ray::TransferQueueController",
    "TransferQueue's storage": "ray::SimpleStorageUnit",
    "Ray's runtime agent": "ray::RuntimeEnvAgent",
    "command": "",
    "verl's driver, and again while it starts": "verl.trainer.main_ppo",
    "command, and again while it starts": "",
}
LOOP_KINDS = {
    "reward worker": "ray::RewardLoopWorker",
    "agent loop worker": "ray::AgentLoopWorker",
    "load balancer": "ray::GlobalRequestLoadBalancer",
}
APART = 8  # steps for each kill
MARK = "COUNTDOWN_ZERO_FAULTS"  # in the environment of a run's processes
PATIENCE = 600  # seconds without a new step after which a run counts as hung
# Adam, because its state must survive too.
SHORT = ["prompts=8", "data.max_response_length=64", "eval_n=1", "trainer.save_freq=2"]
SHORT += ["actor_rollout_ref.actor.optim.optimizer=AdamW", "actor_rollout_ref.actor.optim.lr=1e-4"]
RESTARTS = "trainer.restarts=9999"
OWN_LOOP = [
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null",
    "actor_rollout_ref.rollout.agent.num_workers=1",
]
OWN_LOOP += ["reward.num_workers=1"]


def start(run_dir: Path, steps: int, *overrides: str, **environment: str) -> psutil.Popen:
    """The command of a short run."""
    return typed(run_dir, f"trainer.total_training_steps={steps}", *SHORT, *overrides, **environment)


def typed(run_dir: Path, *overrides: str, **environment: str) -> psutil.Popen:
    """The command of a run in this folder."""
    command = [sys.executable, "-m", "verl_recipes.train", f"run_dir={run_dir}", *overrides]
    return launched(command, run_dir, os.environ | {MARK: str(run_dir)} | environment)


def launched(command: list[str], run_dir: Path, environment: dict[str, str]) -> psutil.Popen:
    """A command in a process group of its own, with what it prints added to the run's log."""
    log_of(run_dir).parent.mkdir(parents=True, exist_ok=True)
    with log_of(run_dir).open("a") as log:
        options = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": log, "start_new_session": True}
        return psutil.Popen(command, preexec_fn=end_with_parent, **options)  # the run saves its step then


def log_of(run_dir: Path) -> Path:
    """What the command printed."""
    return RUNS / f"{run_dir.name}.log"


def fresh(name: str, folder: Path = RUNS) -> Path:
    """A run folder that is not there yet."""
    shutil.rmtree(folder / name, ignore_errors=True)
    log_of(folder / name).unlink(missing_ok=True)
    return folder / name


def last_step(run_dir: Path) -> int:
    """The last training step that the run has finished, 0 if there is none."""
    return max(read_metrics(RunFolder(run_dir)), default=0)


def starts_of(run_dir: Path) -> int:
    """How often the run has started verl."""
    return log_of(run_dir).read_text().count("starting Ray")


def is_saving(run_dir: Path) -> bool:
    """Whether there is a checkpoint's folder that verl does not count yet."""
    folder, counted = run_dir / "checkpoints", last_checkpoint(run_dir / "checkpoints")
    return any(int(path.name.removeprefix("global_step_")) > counted for path in folder.glob("global_step_*"))


def is_measuring(run_dir: Path, step: int) -> bool:
    """Whether the run is answering the test problems after this step."""
    *_, last = [{"split": ""}, *read_lines(run_dir / "samples" / "events.jsonl")]
    return last["split"] == "validation" and last["step"] == step


def of_kind(command: psutil.Popen, kind: str) -> psutil.Process | None:
    """One of the run's processes of a kind."""
    found = []
    for process in command.children(recursive=True):
        try:
            if (KINDS | LOOP_KINDS)[kind] in " ".join(process.cmdline()) + " ":
                found.append(process)
        except psutil.Error:
            continue
    # The driver has the command line of the server, which it forked, and of the server's forks without another name.
    if KINDS.get(kind) == "verl.trainer.main_ppo":
        found = [process for process in found if process.ppid() == command.pid]
    if kind == "fork server":
        found = [process for process in found if process.parent().ppid() == command.pid]
    return random.choice(found) if found else None


def wait_until(condition: Callable[[], Any], command: psutil.Popen, run_dir: Path) -> Any:
    """Wait until the condition holds; returns its value. Exits if the run ends before that, or hangs."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        if command.poll() is not None:
            sys.exit(f"the run ended with status {command.returncode}: see {log_of(run_dir)}")
        if time.monotonic() > deadline:
            sys.exit(f"the run hangs: see {run_dir}")
        time.sleep(0.01)
    return value


def wait_for_step(command: psutil.Popen, run_dir: Path, step: int) -> None:
    wait_until(lambda: last_step(run_dir) >= step, command, run_dir)


def kill(command: psutil.Popen) -> None:
    """Kill the command that a person typed, with its process group."""
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()


def ends_whole(
    command: psutil.Popen, run_dir: Path, steps: int, undisturbed: Path | None = RUNS / "undisturbed"
) -> None:
    """Assert that the run ends at its last step, with every step once and the prompts of the undisturbed run."""
    assert command.wait() == 0, f"see {log_of(run_dir)}"
    lines = [line["step"] for line in read_lines(run_dir / "metrics.jsonl") if "training/global_step" in line["data"]]
    assert lines == list(range(1, steps + 1)), "a step is missing or there twice"
    for step in range(1, steps + 1):
        same = undisturbed is None or prompts_of(run_dir, step) == prompts_of(undisturbed, step)
        assert same, f"prompts of step {step}"
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == steps
    assert not (left := abandoned_scratch()), f"scratch folders are left: {left}"
    left = [process for process in psutil.process_iter(["environ"]) if is_of(process, run_dir)]
    assert not left, f"processes are left: {left}"


def is_of(process: psutil.Process, run_dir: Path) -> bool:
    """Whether a process descends from a run's command."""
    return (process.info["environ"] or {}).get(MARK) == str(run_dir) and process.status() != psutil.STATUS_ZOMBIE


def prompts_of(run_dir: Path, step: int) -> list[str]:
    """The prompts of a step."""
    return sorted({row["prompt"] for row in read_lines(run_dir / "samples" / "train" / f"{step}.jsonl")})


def strike(
    kind: str, command: psutil.Popen, run_dir: Path, steps: int, begin: Callable[[], psutil.Popen]
) -> tuple[psutil.Popen, float]:
    """Kill a process of this kind in a run of so many steps; `begin` types the command again if it is that one.

    Returns:
        The command that runs then, and the seconds until a new step.
    """
    for again in range(1 + kind.endswith("starts")):
        time.sleep(again * random.uniform(0, 25))
        starts = starts_of(run_dir)
        if kind.endswith("saves"):
            wait_until(lambda: is_saving(run_dir), command, run_dir)
        if kind.startswith("command"):
            kill(command)
            command = begin()
        else:
            wait_until(partial(of_kind, command, kind), command, run_dir).kill()
    killed = time.time()
    wait_until(lambda: starts_of(run_dir) > starts, command, run_dir)
    wait_for_step(command, run_dir, min(steps, last_step(run_dir) + 1))
    return command, time.time() - killed


def kills(faults: list[str], name: str, *overrides: str) -> list[tuple[str, float]]:
    """Kill processes of one run; returns the kind and the seconds until a new step for each."""
    steps, run_dir, recovered = APART * (len(faults) + 1), fresh(name), []
    begin = partial(start, run_dir, steps, RESTARTS, *overrides)
    command = begin()
    for number, kind in enumerate(faults):
        wait_for_step(command, run_dir, last_step(run_dir) + random.randint(1, APART - 2))
        if not kind.endswith("saves"):
            time.sleep(random.uniform(0, 3))
        command, seconds = strike(kind, command, run_dir, steps, begin)
        recovered.append((kind, seconds))
        print(f"{number + 1} of {len(faults)}: {kind}, {seconds:.0f} s until a new step", flush=True)
    ends_whole(command, run_dir, steps)
    right = [
        [line["data"]["reward/acc"] for line in read_lines(each / "metrics.jsonl") if "reward/acc" in line["data"]]
        for each in (run_dir, RUNS / "undisturbed")
    ]
    (a, error_a), (b, error_b) = (
        (statistics.fmean(half), statistics.stdev(half) / len(half) ** 0.5)
        for half in (values[steps // 2 : steps] for values in right)
    )
    error = (error_a**2 + error_b**2) ** 0.5
    print(
        f"right in the second half: {a:.3f}, undisturbed {b:.3f}, difference {a - b:+.3f} (standard error {error:.3f})"
    )
    return recovered


def disk_full(name: str, left: int, steps: int = 6) -> float:
    """During a run the disk fills up to `left` bytes; with more room the same command continues."""
    disk = RUNS / name
    disk.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", disk], check=True)
    try:
        run_dir = fresh("run-" + name, disk)
        command = start(run_dir, steps)
        wait_for_step(command, run_dir, 3)
        size = shutil.disk_usage(disk).used + left
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
        assert command.wait(PATIENCE) == 1, f"see {log_of(run_dir)}"
        *_, line = log_of(run_dir).read_text().splitlines()
        print(line)
        assert line.startswith("error: ")
        assert "disk is full" in line or "No space left" in line
        subprocess.run(["mount", "-o", "remount,size=2g", disk], check=True)
        before, again = last_step(run_dir), time.time()
        command = start(run_dir, steps)
        wait_for_step(command, run_dir, before + 1)
        seconds = time.time() - again
        ends_whole(command, run_dir, steps)
        return seconds
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# In every process, the wall clock is behind by the number of seconds in a file. Waits until a time of day (over 1e9,
# which a monotonic clock never reaches) use that clock. Unlike with a clock that is really set back, waits that began
# earlier do not become longer. (libfaketime 0.9.10 fails in Python's `time.sleep`: "Invalid argument".)
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static int (*real)(clockid_t, struct timespec *), (*cond)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static int (*sem)(sem_t *, const struct timespec *);
static long (*call)(long, ...);
static const volatile long *behind;
__attribute__((constructor)) static void look(void) {
    if (real) return;
    real = dlsym(RTLD_NEXT, "clock_gettime"), cond = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    sem = dlsym(RTLD_NEXT, "sem_timedwait"), call = dlsym(RTLD_NEXT, "syscall");
    behind = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, open(getenv("CLOCK"), O_RDONLY), 0);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    look();  // other libraries' constructors may come before ours
    int failed = real(clock, now);
    if (!failed && behind && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec -= *behind;
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec, now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now) *now = precise.tv_sec;
    return precise.tv_sec;
}
static struct timespec until(const struct timespec *end) {
    struct timespec shifted = *end;
    if (behind && end->tv_sec > 1000000000) shifted.tv_sec += *behind;
    return shifted;
}
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *end) {
    look();
    struct timespec shifted = until(end);
    return cond(condition, mutex, &shifted);
}
int sem_timedwait(sem_t *semaphore, const struct timespec *end) {
    look();
    struct timespec shifted = until(end);
    return sem(semaphore, &shifted);
}
long syscall(long number, ...) {
    look();
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
    va_end(rest);
    struct timespec shifted;
    if (number == SYS_futex && a[1] & FUTEX_CLOCK_REALTIME && a[3])
        shifted = until((void *)a[3]), a[3] = (long)&shifted;
    return call(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
"""


def clock_back(steps: int = 6) -> None:
    """During a run the clock is set back by an hour, for every process at once."""
    run_dir, library, behind = fresh("clock"), RUNS / "clock.so", RUNS / "clock_behind"
    command = ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-o", library, "-"]
    subprocess.run(command, input=CLOCK, text=True, check=True)
    behind.write_bytes(bytes(8))
    run = start(run_dir, steps, LD_PRELOAD=str(library), CLOCK=str(behind))
    wait_for_step(run, run_dir, 2)
    with behind.open("r+b") as file:  # overwritten in place, because the processes map it
        file.write((3600).to_bytes(8, sys.byteorder))
    ends_whole(run, run_dir, steps)
    times = [event["time"] for event in read_lines(run_dir / "samples" / "events.jsonl")]
    assert min(b - a for a, b in pairwise(times)) < -3000, "the clock was not set back"


def last_evaluation(steps: int = 4) -> None:
    """The command is killed between its last step and the end of the evaluation that follows."""
    run_dir = fresh("last_evaluation")
    command = start(run_dir, steps)
    wait_until(lambda: last_step(run_dir) >= 1 and is_measuring(run_dir, steps), command, run_dir)
    kill(command)
    ends_whole(start(run_dir, steps), run_dir, steps)


def more_steps(steps: int = 4) -> None:
    """A complete run is continued with more steps."""
    run_dir = fresh("more_steps")
    ends_whole(start(run_dir, steps), run_dir, steps)
    ends_whole(start(run_dir, steps + 2), run_dir, steps + 2)


def epoch_end() -> None:
    """An epoch of two steps; the command is killed in the second epoch, and goes on from the end of the first."""
    run_dir, few = fresh("epoch_end"), "data.train_max_samples=16"
    command = start(run_dir, 6, few)
    wait_for_step(command, run_dir, 3)
    kill(command)
    assert last_checkpoint(run_dir / "checkpoints") == 2
    ends_whole(start(run_dir, 6, few), run_dir, 6, undisturbed=None)
    epochs = [prompts_of(run_dir, step) + prompts_of(run_dir, step + 1) for step in (1, 3, 5)]
    assert [len(set(epoch)) for epoch in epochs] == [16, 16, 16], "a prompt is missing in an epoch"
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1


def two_at_once(steps: int = 4) -> None:
    """Two runs on one machine."""
    run_dirs = [fresh(f"at_once_{i}") for i in (1, 2)]
    commands = [start(run_dir, steps) for run_dir in run_dirs]
    assert commands[0].wait() == 0, f"see {log_of(run_dirs[0])}"  # the other one's scratch folder may still be there
    ends_whole(commands[1], run_dirs[1], steps)
    ends_whole(commands[0], run_dirs[0], steps)


def ports_taken(steps: int = 4) -> None:
    """The usual ports of Ray (head, client, dashboard), vLLM's server and torch's store are taken."""
    run_dir = fresh("ports")
    with ExitStack() as taken:
        for port in (6379, 10001, 8265, 8000, 29500):
            taken.enter_context(socket.create_server(("", port)))
        ends_whole(start(run_dir, steps), run_dir, steps)


def of_two_nodes(name: str, fault: Callable[..., psutil.Popen], steps: int = 6) -> float:
    """A fault after step 3 of a run over two Ray nodes, each in a network namespace of its own (root)."""
    sys.path.append(str(ROOT / "tests"))
    from two_nodes import TWO_NODES, running

    run_dir = fresh(name)

    def submit() -> psutil.Popen:
        total = f"trainer.total_training_steps={steps}"
        command = cluster.submission(f"run_dir={run_dir}", total, "trainer.restarts=2", *SHORT, *TWO_NODES)
        return launched(cluster.on(0, *command), run_dir, cluster.environment)

    with running() as cluster:
        assert cluster.apart, "no network namespaces here"
        command = submit()
        wait_for_step(command, run_dir, 3)
        since = time.time()
        command = fault(cluster, command, run_dir, submit)
        wait_for_step(command, run_dir, last_step(run_dir) + 1)
        seconds = time.time() - since
        ends_whole(command, run_dir, steps)
        return seconds


def silent(cluster: Any, command: psutil.Popen, run_dir: Path, _: object) -> psutil.Popen:
    """The second node's network goes silent; it comes back when the run says that a node is missing."""
    cluster.link("down")
    wait_until(lambda: "the Ray cluster has nodes of [1] GPUs" in log_of(run_dir).read_text(), command, run_dir)
    cluster.link("up")
    cluster.kill_node(1)
    cluster.start(1)
    return command


def head_dies(cluster: Any, command: psutil.Popen, run_dir: Path, submit: Callable[[], psutil.Popen]) -> psutil.Popen:
    """The head's node dies, and the job with it. The cluster is restarted, and the job is submitted again."""
    for node in (0, 1):
        cluster.kill_node(node)
    cluster.start_both()
    assert command.wait(PATIENCE) == 1, f"see {log_of(run_dir)}"
    assert "its head was started anew" in log_of(run_dir).read_text()
    return submit()


CASES: dict[str, Callable[[], float | None]] = {
    "disk full at a checkpoint": lambda: disk_full("disk_checkpoint", 3_000_000),
    "disk full at a sample dump": lambda: disk_full("disk_samples", 40_000),
    "disk full at the next byte of any file": lambda: disk_full("disk_any", 0),
    "clock set back by an hour": clock_back,
    "command, while the trained model is measured": last_evaluation,
    "command, resumed at an epoch's end": epoch_end,
    "more steps asked of a complete run": more_steps,
    "two runs at once": two_at_once,
    "the usual ports taken": ports_taken,
    "network of the second node silent": lambda: of_two_nodes("silent", silent),
    "the head's node": lambda: of_two_nodes("head", head_dies),
}


def record(name: str, seconds: float | None) -> None:
    """Add a fault to the recorded ones, and write the table."""
    recovered: dict[str, list[float | None]] = json.loads(RECOVERED.read_text()) if RECOVERED.exists() else {}
    recovered.setdefault(name, []).append(seconds)
    write_whole(RECOVERED, json.dumps(recovered, indent=2))
    text = "| fault | times | steps or prompts lost or repeated | seconds until a new step, median and most |\n"
    text += "| --- | --- | --- | --- |\n"
    for fault in filter(recovered.__contains__, (*KINDS, *LOOP_KINDS, *CASES)):
        known = [value for value in recovered[fault] if value is not None]
        recovery = f"{statistics.median(known):.0f}, {max(known):.0f}" if known else "-"
        text += f"| {fault} | {len(recovered[fault])} | 0 | {recovery} |\n"
    TABLE.write_text(text)


def main(times: int = 3, *names: str) -> None:
    asked = names or (*KINDS, *LOOP_KINDS, *CASES)
    if unknown := {*asked} - {*KINDS, *LOOP_KINDS, *CASES}:
        sys.exit(f"error: there is no fault {', '.join(unknown)}")
    rounds = [[name for name in kinds if name in asked] for kinds in (KINDS, LOOP_KINDS)]
    undisturbed, steps = RUNS / "undisturbed", APART * (len(KINDS) + 1)
    if last_step(undisturbed) < steps:  # a shorter one is not continued, as a resume samples anew
        fresh(undisturbed.name)
    command = start(undisturbed, max(steps, last_step(undisturbed)))
    assert command.wait() == 0, f"see {log_of(undisturbed)}"
    for name in asked:
        if name in CASES:
            record(name, CASES[name]())
            print(f"{name}: nothing lost", flush=True)
    for _ in range(times):
        for faults, overrides in zip(rounds, ([], OWN_LOOP), strict=True):
            random.shuffle(faults)
            for kind, seconds in kills(faults, f"killed{len(overrides)}", *overrides) if faults else ():
                record(kind, seconds)
    print(TABLE.read_text())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
