"""python benchmarks/long_run.py [hours]: what grows in a run of two hours on a CPU.

The tiny recipe, at a learning rate that does not change the responses' length, is ended by SIGTERM after the time. Once
a minute this measures memory (sum of proportional set sizes), processes, open files, shared-memory segments, and the
bytes of log.txt and of Ray's scratch folder. Writes the table of benchmarks/long_run.md: the medians of the first and
the last quarter, without the first minutes. Afterwards nothing of the run may be left.
"""

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from verl_recipes.run.folder import read_lines
from verl_recipes.run.supervise import SCRATCH, TEMPORARY, end_with_parent, segments

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "runs" / "long_run"
WARM_UP = 10  # samples left out


def size(folder: Path) -> int:
    """Bytes of the files below a folder; 0 for one that is not there."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # it went in between
            continue
    return total


def sample(command: psutil.Popen, before: set[Path]) -> dict[str, float]:
    """What the run holds now."""
    memory, files, processes = 0, 0, 0
    for process in [command, *command.children(recursive=True)]:
        try:
            memory += process.memory_full_info().pss
            files += process.num_fds()
            processes += 1
        except psutil.Error:
            continue
    (scratch,) = TEMPORARY.glob(f"{SCRATCH}{command.pid}-*")
    return {
        "memory, GB": memory / 1e9,
        "processes": processes,
        "open files": files,
        "shared-memory segments": len(segments() - before),
        "log.txt, MB": (RUN / "log.txt").stat().st_size / 1e6,
        "scratch folder, MB": size(scratch) / 1e6,
    }


def main(hours: float = 2) -> None:
    shutil.rmtree(RUN, ignore_errors=True)
    before, began, samples = segments(), time.time(), []
    options = ["trainer.total_training_steps=1000000", "actor_rollout_ref.actor.optim.lr=0.01", "eval_n=1"]
    typed = [sys.executable, "-m", "verl_recipes.train", f"run_dir={RUN}", *options]
    command = psutil.Popen(typed, cwd=ROOT, preexec_fn=end_with_parent)
    while time.time() < began + hours * 3600:
        time.sleep(60)
        assert command.poll() is None, "the run ended"
        samples.append(sample(command, before))
    command.terminate()
    assert command.wait() == 143
    assert not list(TEMPORARY.glob(f"{SCRATCH}{command.pid}-*")), "the scratch folder is left"
    assert segments() <= before, "segments are left"
    steps = [line["step"] for line in read_lines(RUN / "metrics.jsonl") if "training/global_step" in line["data"]]
    assert steps == list(range(1, steps[-1] + 1))
    kept = samples[WARM_UP:] or samples
    quarter = max(1, len(kept) // 4)
    text = f"{hours:g} hours, {steps[-1]} steps.\n\n| | first quarter | last quarter |\n| --- | --- | --- |\n"
    for name in kept[0]:
        first, last = (statistics.median(each[name] for each in part) for part in (kept[:quarter], kept[-quarter:]))
        text += f"| {name} | {first:.4g} | {last:.4g} |\n"
    folder = subprocess.run(["du", "-sm", RUN], capture_output=True, text=True, check=True).stdout.split()[0]
    text += f"\nThe run folder has {folder} MB, its samples {size(RUN / 'samples') / 1e6 / steps[-1]:.2f} MB a step.\n"
    (ROOT / "benchmarks" / "long_run.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
