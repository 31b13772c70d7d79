"""python benchmarks/gain.py [seed ...]: the gain of the tiny run for several seeds, and of the random-reward control.

Does the run of README's first command once for each seed, and once with `reward=random`. Writes what each reports to
benchmarks/results/gain.json, and from it the table of benchmarks/gain.md, which README repeats. A run takes about five
minutes on two cores. Complete runs are not repeated.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_prep import datasheet
from verl_recipes.reporting.metrics import AGREEMENT, seconds_of
from verl_recipes.run.folder import RunFolder, read_lines

ROOT = Path(__file__).resolve().parent.parent
RAW = ROOT / "benchmarks" / "results" / "gain.json"
FIGURES = {"mean@8": 3, "pass@8": 3, "response_tokens": 0, "candidates": 1, "truncated": 2}  # digits
COLUMNS = ["run", *(name.replace("_", " ") for name in FIGURES), "least agreement", "minutes"]


def facts(run: RunFolder) -> dict[str, Any]:
    """What a complete run reports: its figures before and after training, least agreement, seconds, commit."""
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    agreements = [line["data"][name] for line in read_lines(run.metrics) for name in AGREEMENT if name in line["data"]]
    sides = {side: {name: summary[side][name] for name in FIGURES} for side in ("base", "trained")}
    seconds = summary["seconds"] | {"total": seconds_of(summary)}  # of all starts
    return {"git_commit": summary["git_commit"], "seconds": seconds, "agreement": min(agreements)} | sides


def table(runs: dict[str, dict[str, Any]]) -> str:
    """A line a run; values before and after training are joined by an arrow."""
    rows = []
    for name, found in runs.items():
        sides = found["base"], found["trained"]
        cells = [" → ".join(f"{side[key]:.{digits}f}" for side in sides) for key, digits in FIGURES.items()]
        rows.append([name, *cells, f"{found['agreement']:.6f}", f"{found['seconds']['total'] / 60:.1f}"])
    return datasheet.table(COLUMNS, rows)


def main(seeds: list[str]) -> None:
    runs = {f"tiny-seed{seed}": [f"seed={seed}"] for seed in seeds}
    runs[f"random-reward-seed{seeds[0]}"] = [f"seed={seeds[0]}", "reward=random"]
    for name, overrides in runs.items():
        subprocess.run([sys.executable, "-m", "verl_recipes.train", f"name={name}", *overrides], cwd=ROOT, check=True)
    found = {
        name: {"command": " ".join(["python -m verl_recipes.train", f"name={name}", *overrides])}
        | facts(RunFolder(ROOT / "runs" / name))
        for name, overrides in runs.items()
    }
    found = (json.loads(RAW.read_text(encoding="utf-8")) if RAW.exists() else {}) | found  # other seeds stay
    RAW.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (ROOT / "benchmarks" / "gain.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:] or ["0", "1", "2"])
