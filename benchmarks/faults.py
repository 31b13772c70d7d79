"""python benchmarks/faults.py [times [kind ...]]: `kill -9` of the processes of a run, at random; nothing may be lost.

One run of the tiny recipe, small, with `trainer.restarts`: its processes are killed one after another, each kind
`times` times (3), some steps apart and at any moment of a step, a checkpoint's saving included. `command` is the
command that a person typed, killed with its whole process group, and typed again. An undisturbed run of the same steps
stands beside it: the prompts of every step must be the same, none repeated and none left out, every step must be there
once, and the run must end at its last step with nothing left on the machine. Prints the table of benchmarks/faults.md
and writes it. Some minutes for each round of kinds on two cores.
"""

import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil

from verl_recipes.summary import read_samples
from verl_recipes.supervise import SCRATCH, TEMPORARY
from verl_recipes.train import last_checkpoint

ROOT = Path(__file__).resolve().parent.parent
KINDS = {  # what a process of this kind has in its command line
    "verl's driver": "verl.trainer.main_ppo",
    "trainer": "ray::TaskRunner",
    "training worker": "ray::WorkerDict",
    "training worker, while it saves": "ray::WorkerDict",
    "vLLM's server": "ray::CPUServer",
    "vLLM's engine": "VLLM::EngineCore",
    "fork server": "forkserver.py --serve",
    "raylet": "raylet/raylet ",
    "Ray's head (GCS)": "gcs/gcs_server",
    "command": "",
}
APART = 4  # steps for each fault
SHORT = ["prompts=8", "data.max_response_length=64", "eval_n=1", "trainer.save_freq=2", "trainer.restarts=9999"]


def start(run_dir: Path, steps: int) -> psutil.Popen:
    """The run's command, in a process group of its own."""
    command = [sys.executable, "-m", "verl_recipes.train", f"run_dir={run_dir}", *SHORT]
    log = (run_dir.parent / f"{run_dir.name}.log").open("a")
    return psutil.Popen(
        [*command, f"trainer.total_training_steps={steps}"], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
    )


def last_step(run_dir: Path) -> int:
    """The last training step that the run has finished, 0 where there is none."""
    files = [run_dir / "metrics.jsonl", run_dir / "metrics.part.jsonl"]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines() if line.endswith("}")]
    return max((json.loads(line)["step"] for line in lines), default=0)


def is_saving(run_dir: Path) -> bool:
    """Whether there is a checkpoint's folder that verl does not count yet."""
    folder, counted = run_dir / "checkpoints", last_checkpoint(run_dir)
    return any(int(path.name.removeprefix("global_step_")) > counted for path in folder.glob("global_step_*"))


def of_kind(command: psutil.Popen, kind: str) -> list[psutil.Process]:
    """The run's processes of a kind; ends the program where there is none, as that fault would not be injected.

    A fork that does not name itself, as vLLM's engine, has the fork server's command line; the server is the one that
    the command itself started.
    """
    found = []
    for process in command.children(recursive=True):
        try:
            if KINDS[kind] in " ".join(process.cmdline()) + " ":
                found.append(process)
        except psutil.Error:
            continue
    if kind == "fork server":
        found = [process for process in found if process.ppid() == command.pid]
    return found or sys.exit(f"no process of the kind {kind!r} was found")


def wait_for_step(command: psutil.Popen, run_dir: Path, step: int) -> None:
    """Until the run has finished a step; ends the program where the run ended before."""
    while last_step(run_dir) < step:
        if command.poll() is not None:
            sys.exit(f"the run ended with status {command.returncode}: see {run_dir}.log")
        time.sleep(0.05)


def prompts_of(run_dir: Path, step: int) -> list[str]:
    """The prompts of a step."""
    return sorted({row["prompt"] for row in read_samples(run_dir / "samples" / "train" / f"{step}.jsonl")})


def main(times: int = 3, *kinds: str) -> None:
    faults = [kind for kind in kinds or KINDS for _ in range(times)]
    random.Random(0).shuffle(faults)
    steps = APART * (len(faults) + 1)
    run_dir, undisturbed = (ROOT / "runs" / "faults" / name for name in ("killed", "undisturbed"))
    for folder in (run_dir, undisturbed):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
    recovered = defaultdict(list)
    command = start(run_dir, steps)
    for number, kind in enumerate(faults):
        wait_for_step(command, run_dir, last_step(run_dir) + random.randint(1, APART - 2))
        if kind.endswith("saves"):
            while not is_saving(run_dir):
                time.sleep(0.002)
        else:
            time.sleep(random.uniform(0, 3))
        before, killed = last_step(run_dir), time.time()
        if kind == "command":
            os.killpg(command.pid, signal.SIGKILL)
            command.wait()
            command = start(run_dir, steps)
        else:
            of_kind(command, kind)[0].kill()
        wait_for_step(command, run_dir, min(steps, before + 1))
        recovered[kind].append(time.time() - killed)
        print(f"{number + 1} of {len(faults)}: {kind}, {recovered[kind][-1]:.0f} s until a new step", flush=True)
    assert command.wait() == 0, f"see {run_dir}.log"
    assert start(undisturbed, steps).wait() == 0, f"see {undisturbed}.log"

    lines = [line["step"] for line in read_samples(run_dir / "metrics.jsonl") if "training/global_step" in line["data"]]
    assert lines == list(range(1, steps + 1)), "a step is missing or there twice"
    for step in range(1, steps + 1):
        assert prompts_of(run_dir, step) == prompts_of(undisturbed, step), f"other prompts at step {step}"
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == steps
    assert not list(TEMPORARY.glob(f"{SCRATCH}*")), "scratch folders are left"
    text = "| killed | times | steps or prompts lost or repeated | seconds until a new step, median and most |\n"
    text += "| --- | --- | --- | --- |\n"
    for kind, seconds in recovered.items():
        text += f"| {kind} | {len(seconds)} | 0 | {statistics.median(seconds):.0f}, {max(seconds):.0f} |\n"
    (ROOT / "benchmarks" / "faults.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
