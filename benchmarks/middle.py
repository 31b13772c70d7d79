"""python benchmarks/middle.py [seed ...]: what a warm start is worth on the middle rung.

For each seed a warm start, GRPO from it, and GRPO from the base model. Each run of GRPO measures its model before and
after on the same 256 test problems, 8 responses a problem, so the warm start alone is measured too. Writes
benchmarks/results/middle/seed<N>.json; `python benchmarks/results.py page` makes the tables of them. What is complete
is not repeated. `bash launch/middle.sh` makes the base model and the traces.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from results import RESULTS, rounded

from verl_recipes.measure.comparison import compare
from verl_recipes.reporting.run import found_in
from verl_recipes.run.folder import RunFolder, read_json, read_lines, write_whole

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ("pass@8", "response_tokens", "candidates", "truncated")
RUN = ["model=middle", "recipe=middle", "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"]
WARM_START = ["traces=data/middle-traces", "steps=60", "lr=5e-4"]


def commands_of(seed: int) -> list[list[str]]:
    """Of a seed: the warm start, GRPO from it, and GRPO from the base."""
    warm = f"middle-warm-seed{seed}"
    both, cold = f"middle-seed{seed}", f"middle-cold-seed{seed}"
    return [
        ["verl_recipes.warm_start", f"name={warm}", f"seed={seed}", *RUN, *WARM_START],
        ["verl_recipes.train", f"name={both}", f"seed={seed}", *RUN, f"warm_start=runs/{warm}"],
        ["verl_recipes.train", f"name={cold}", f"seed={seed}", *RUN],
    ]


def measured(seed: int) -> dict[str, Any]:
    """What the two runs of a seed measured, and the paired tests."""
    after_warm_start, cold = (RunFolder(ROOT / "runs" / f"middle{kind}-seed{seed}") for kind in ("", "-cold"))
    models: dict[str, Any] = {}
    samples = {}
    for name, run, side, place in (
        ("base", cold, "base", 0),
        ("cold", cold, "trained", -1),
        ("warm start", after_warm_start, "base", 0),
        ("both", after_warm_start, "trained", -1),
    ):
        figures = read_json(run.summary, "")[side]
        samples[name] = read_lines(list(run.sample_files("validation").values())[place])
        models[name] = {key: figures[key] for key in FIGURES}
        models[name]["backtracking"] = fmean(each["backtracking"] > 0 for each in found_in(samples[name]))
    pairs = (("warm start", "both"), ("cold", "both"), ("base", "cold"))
    tests = {f"{one}, {other}": compare(samples[one], samples[other]) for one, other in pairs}
    about = read_json(cold.summary, "")
    kept = {"model": read_json(cold.mark, "")["model"]} | {key: about[key] for key in ("git_commit", "versions")}
    return {"models": models, "tests": tests} | kept


def main(seeds: list[str]) -> None:
    for seed in map(int, seeds):
        target = RESULTS / "middle" / f"seed{seed}.json"
        if target.exists():
            continue
        commands = commands_of(seed)
        for command in commands:
            print("python -m", *command, flush=True)
            subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
        result = {"commands": [" ".join(["python -m", *command]) for command in commands]} | measured(seed)
        target.parent.mkdir(exist_ok=True)
        write_whole(target, json.dumps(rounded(result), indent=1) + "\n")
        print(f"wrote {target}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["0", "1", "2"])
