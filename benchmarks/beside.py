"""python benchmarks/beside.py [steps]: the tiny run by verl, by TRL and by a bare PyTorch loop, one after another.

All have the same model, prompts, samples, lengths, optimizer and reward, and use both cores, so nothing else should
run. TRL needs the environment that benchmarks/trl_run.py describes; the bare loop is learn/4_clip.py with one update.
Prints and writes the table of benchmarks/beside.md. The 30 steps of the recipe take about fifteen minutes.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from verl_recipes.run.folder import read_lines

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "runs" / "beside"


def lines_of(command: list[str]) -> list[dict[str, float]]:
    """The steps that a command prints as JSON, each with `ended_s`, the seconds since it was started."""
    began, lines = time.time(), []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith('{"step"'):
                lines.append(json.loads(line) | {"ended_s": time.time() - began})
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    return lines


def verl(steps: str) -> list[dict[str, float]]:
    """The same for verl's run, which first measures the base model with one response to each problem."""
    began = time.time()
    short = ["eval_n=1", f"trainer.total_training_steps={steps}", f"trainer.save_freq={steps}"]
    command = [sys.executable, "-m", "verl_recipes.train", f"run_dir={RUN}", "fresh=true", *short]
    subprocess.run(command, cwd=ROOT, check=True)
    events = read_lines(RUN / "samples" / "events.jsonl")
    ended = [event["time"] - began for event in events if event["event"] == "generating"]
    ended = ended[2:]  # without the measurement and the first step: a step ends when the next one starts
    rows = [line["data"] for line in read_lines(RUN / "metrics.jsonl") if "training/global_step" in line["data"]]
    names = {"acc": "reward/acc", "tokens": "response_length/mean", "step_s": "timing_s/step"}
    return [
        {"ended_s": end} | {name: row[key] for name, key in names.items()}
        for row, end in zip(rows, ended, strict=False)
    ]


def right(lines: list[dict[str, float]]) -> float:
    """Mean accuracy of some steps."""
    return statistics.fmean(line["acc"] for line in lines)


def main(steps: str = "30") -> None:
    python = ROOT / ".venv-trl" / "bin" / "python"
    if not python.exists():
        sys.exit(f"{python} is missing: benchmarks/trl_run.py says how to make that environment")
    runs = {
        "verl, this project": verl(steps),
        "TRL's GRPOTrainer": lines_of([str(python), "benchmarks/trl_run.py", str(RUN), steps]),
        "bare PyTorch loop": lines_of([sys.executable, "learn/4_clip.py", "updates=1", f"steps={steps}"]),
    }
    # Each training problem occurs once, so this is the accuracy on unseen problems. Three steps are 768 responses.
    limit = statistics.median(line["step_s"] for line in runs["bare PyTorch loop"])
    text = "| | first step ended, s | a step, s (median) | of the bare loop's | half of three steps right, s | "
    text += "response tokens, last steps |\n| --- | --- | --- | --- | --- | --- |\n"
    for name, lines in runs.items():
        step = statistics.median(line["step_s"] for line in lines)
        tokens = statistics.fmean(line["tokens"] for line in lines[-5:])
        half = [lines[i]["ended_s"] for i in range(2, len(lines)) if right(lines[i - 2 : i + 1]) >= 0.5]
        text += f"| {name} | {lines[0]['ended_s']:.0f} | {step:.1f} | {step / limit:.1f} | "
        text += f"{f'{half[0]:.0f}' if half else '-'} | {tokens:.0f} |\n"
    (ROOT / "benchmarks" / "beside.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
