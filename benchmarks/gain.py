"""python benchmarks/gain.py [seed ...]: the gain of the tiny run for several seeds, and of the random-reward control.

Does the run of README's first command once for each seed, and once with `reward=random`. Writes the table of
benchmarks/gain.md, which README repeats. A run takes about five minutes on two cores. Complete runs are not repeated.
"""

import json
import subprocess
import sys
from pathlib import Path

from verl_recipes.reporting.metrics import AGREEMENT

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["run", "mean@8", "pass@8", "response tokens", "candidates", "truncated", "least agreement", "minutes"]


def row(name: str) -> list[str]:
    """A complete run's cells; values before and after training are joined by an arrow."""
    run_dir = ROOT / "runs" / name
    summary = json.loads((run_dir / "summary.json").read_text())
    base, trained = summary["base"], summary["trained"]

    def both(key: str, digits: int) -> str:
        return f"{base[key]:.{digits}f} → {trained[key]:.{digits}f}"

    lines = [json.loads(line)["data"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    agreement = min(line[name] for line in lines for name in AGREEMENT if name in line)
    figures = [both("mean@8", 3), both("pass@8", 3), both("response_tokens", 0), both("candidates", 1)]
    return [name, *figures, both("truncated", 2), f"{agreement:.6f}", f"{summary['seconds']['total'] / 60:.1f}"]


def main(seeds: list[str]) -> None:
    runs = {f"tiny-seed{seed}": [f"seed={seed}"] for seed in seeds}
    runs[f"random-reward-seed{seeds[0]}"] = [f"seed={seeds[0]}", "reward=random"]
    for name, overrides in runs.items():
        subprocess.run([sys.executable, "-m", "verl_recipes.train", f"name={name}", *overrides], cwd=ROOT, check=True)
    table = [COLUMNS, ["---"] * len(COLUMNS), *map(row, runs)]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    (ROOT / "benchmarks" / "gain.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:] or ["0", "1", "2"])
