"""python benchmarks/gain.py [seed ...]: the gain of the tiny run for several seeds, and of the random-reward control.

Runs what README's first command runs, once a seed, and once with `reward=random`; prints one table. About five minutes
a run on two cores. Runs that are complete are read, not repeated.
"""

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
AGREEMENT = "training/rollout_actor_probs_pearson_corr"


def main(seeds: list[str]) -> None:
    table = Table("run", "base mean@8", "trained mean@8", "pass@8", "response tokens", "least agreement", "seconds")
    runs = [(f"tiny-seed{seed}", [f"seed={seed}"]) for seed in seeds]
    runs.append((f"control-seed{seeds[0]}", [f"seed={seeds[0]}", "reward=random"]))
    for name, overrides in runs:
        command = [sys.executable, "-m", "verl_recipes.train", f"name={name}", *overrides]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        run_dir = ROOT / "runs" / name
        summary = json.loads((run_dir / "summary.json").read_text())
        lines = [json.loads(line)["data"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        base, trained = summary["base"], summary["trained"]
        table.add_row(
            name,
            f"{base['mean@8']:.3f}",
            f"{trained['mean@8']:.3f}",
            f"{base['pass@8']:.3f} -> {trained['pass@8']:.3f}",
            f"{base['response_tokens']:.0f} -> {trained['response_tokens']:.0f}",
            f"{min(line[AGREEMENT] for line in lines if AGREEMENT in line):.6f}",
            f"{summary['seconds']['total']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:] or ["0", "1", "2"])
