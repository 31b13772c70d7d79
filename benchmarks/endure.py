"""python benchmarks/endure.py [hours]: six hours of training with a kill every ten minutes.

The tiny recipe with 128 prompts a step, twice, side by side. In the run `killed`, `kill -9` ends one of its processes
every ten minutes, of a random kind of benchmarks/faults.py; `undisturbed` is left alone. After `hours` (2) SIGTERM ends
both, and the same command continues them. When both are complete, this writes benchmarks/endure.md: what the two
learned, and where their time went. No step and no prompt may be lost or repeated, and the killed run may not end worse.
"""

import random
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

from faults import KINDS, RESTARTS, RUNS, ends_whole, last_step, strike, typed

from reward_score.figures import interval
from verl_recipes.measure.comparison import compare
from verl_recipes.run.folder import RunFolder, append_line, read_json, read_lines

ROOT = Path(__file__).resolve().parent.parent
UNDISTURBED, KILLED = RUNS / "endure-undisturbed", RUNS / "endure-killed"
KILLS = RUNS / "endure-kills.jsonl"  # of each kill the kind, and the seconds until a new step
APART, STEPS = 600, 400  # seconds between kills; steps of a run, of which the killed one makes 65 an hour on two cores
OPTIONS = [RESTARTS, "prompts=128", f"trainer.total_training_steps={STEPS}", "trainer.test_freq=100"]


def go_on(hours: float) -> None:
    """Continue both runs for so many hours, or to their end."""
    began, struck = time.time(), 0
    begin = partial(typed, KILLED, *OPTIONS)
    undisturbed, killed = typed(UNDISTURBED, *OPTIONS), begin()
    while time.time() < began + hours * 3600 and {undisturbed.poll(), killed.poll()} != {0}:
        time.sleep(1)
        if time.time() > began + (struck + 1) * APART and last_step(KILLED) < STEPS:
            struck, kind = struck + 1, random.choice(list(KINDS))
            killed, seconds = strike(kind, killed, KILLED, STEPS, begin)
            append_line(KILLS, {"kind": kind, "seconds": seconds})
            print(f"step {last_step(KILLED)}: killed {kind}, {seconds:.0f} s until a new step", flush=True)
    for run_dir, command in ((UNDISTURBED, undisturbed), (KILLED, killed)):
        if command.poll() is None:
            command.terminate()
        command.wait()
        print(f"{run_dir.name}: step {last_step(run_dir)} of {STEPS}", flush=True)
    if {undisturbed.returncode, killed.returncode} == {0}:
        ends_whole(undisturbed, UNDISTURBED, STEPS, undisturbed=None)
        ends_whole(killed, KILLED, STEPS, UNDISTURBED)


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
    if not all(spent):  # the clock was set back
        return text
    for name in (key for key in spent[0] if key != "share"):
        text += f"| hours: {name} | {spent[0][name] / 3600:.2f} | {spent[1][name] / 3600:.2f} | | |\n"
    return text + f"| goodput | {spent[0]['share']:.3f} | {spent[1]['share']:.3f} | | |\n"


def main(hours: str = "2") -> None:
    go_on(float(hours))
    runs = RunFolder(UNDISTURBED), RunFolder(KILLED)
    if all(run.summary.exists() for run in runs):
        text = table(*runs)
        (ROOT / "benchmarks" / "endure.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
