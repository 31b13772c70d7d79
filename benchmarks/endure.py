"""python benchmarks/endure.py killed|undisturbed [hours]: six hours of training with a kill every ten minutes.

GRPO on the middle rung for 600 steps, from the base model. In the run `killed`, `kill -9` ends one of its processes
every ten minutes, of a random kind of benchmarks/faults.py; `undisturbed` is the same run left alone. After `hours` (2)
SIGTERM ends the command, and the same command continues. When both runs are complete, this writes benchmarks/endure.md:
what the two learned, and where their time went. No step and no prompt may be lost or repeated, and the killed run may
not end worse. Needs two idle cores, and the base model of `bash launch/middle.sh`.
"""

import random
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

from faults import KINDS, RESTARTS, RUNS, ends_whole, last_step, strike, typed
from middle import RUN

from reward_score.figures import interval
from verl_recipes.measure.comparison import compare
from verl_recipes.run.folder import RunFolder, append_line, read_json, read_lines

ROOT = Path(__file__).resolve().parent.parent
KILLS = RUNS / "endure-kills.jsonl"  # of each kill the kind, and the seconds until a new step
APART, STEPS = 600, 600  # seconds between kills, steps of a run
OPTIONS = [*RUN, RESTARTS, f"trainer.total_training_steps={STEPS}", "trainer.test_freq=100"]


def go_on(run_dir: Path, beside: Path | None, hours: float, kills: bool) -> None:
    """Continue a run for so many hours or to its end, where its prompts must be those of the run beside it."""
    began, struck = time.time(), 0
    begin = partial(typed, run_dir, *OPTIONS)
    command = begin()
    while command.poll() is None and time.time() < began + hours * 3600:
        time.sleep(1)
        if kills and time.time() > began + (struck + 1) * APART and last_step(run_dir) < STEPS:
            struck, kind = struck + 1, random.choice(list(KINDS))
            command, seconds = strike(kind, command, run_dir, STEPS, begin)
            append_line(KILLS, {"kind": kind, "seconds": seconds})
            print(f"step {last_step(run_dir)}: killed {kind}, {seconds:.0f} s until a new step", flush=True)
    if command.poll() is None:
        command.terminate()
        command.wait()
    else:
        ends_whole(command, run_dir, STEPS, beside)
    print(f"{run_dir.name}: step {last_step(run_dir)} of {STEPS}", flush=True)


def table(undisturbed: RunFolder, killed: RunFolder) -> str:
    """What two complete runs learned, and where their time went."""
    seconds = [kill["seconds"] for kill in read_lines(KILLS)]
    text = f"{len(seconds)} kills; seconds until a new step: {median(seconds):.0f}, at most {max(seconds):.0f}.\n\n"
    text += "| | undisturbed | killed | difference | p |\n| --- | --- | --- | --- | --- |\n"
    files = [run.sample_files("validation") for run in (undisturbed, killed)]
    for step in files[0]:
        found = compare(*(read_lines(each[step]) for each in files))
        figures = " | ".join(interval(found[key]) for key in ("first", "second", "difference"))
        text += f"| mean@8 after {step} steps | {figures} | {found['p']:.2f} |\n"
    spent = [read_json(run.summary, "")["goodput"] for run in (undisturbed, killed)]
    for name in (key for key in spent[0] if key != "share"):
        text += f"| hours: {name} | {spent[0][name] / 3600:.2f} | {spent[1][name] / 3600:.2f} | | |\n"
    return text + f"| goodput | {spent[0]['share']:.3f} | {spent[1]['share']:.3f} | | |\n"


def main(name: str, hours: str = "2") -> None:
    folders = {each: RUNS / f"endure-{each}" for each in ("undisturbed", "killed")}
    (other,) = (folder for each, folder in folders.items() if each != name)
    whole = RunFolder(other).summary.exists()
    go_on(folders[name], other if whole else None, float(hours), name == "killed")
    if whole and RunFolder(folders[name]).summary.exists():
        text = table(*map(RunFolder, folders.values()))
        (ROOT / "benchmarks" / "endure.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
