"""python benchmarks/middle.py [seed ...]: what a warm start is worth on the middle rung.

For each seed a warm start, GRPO from it, and GRPO from the base model. Each run of GRPO measures its model before and
after on the same 256 test problems, 8 responses a problem, so the warm start alone is measured too. Writes
benchmarks/results/middle/seed<N>.json; `python benchmarks/results.py page` makes the tables of them. What is complete
is not repeated. `bash launch/middle.sh` makes the base model and the traces. A seed takes about an hour on two cores.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from results import RESULTS, rounded

from verl_recipes.measure.comparison import compare
from verl_recipes.run.folder import RunFolder, read_json, read_lines

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ("mean@8", "pass@8", "response_tokens", "candidates", "truncated")
WARM_START = ["traces=data/middle-traces", "model=middle", "recipe=middle", "steps=160", "batch=64", "lr=1e-3"]
WARM_START += ["actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"]


def commands_of(seed: int) -> dict[str, list[str]]:
    """The three commands of a seed, by the folder that each fills."""
    warm = f"middle-warm-seed{seed}"
    run = ["verl_recipes.train", "model=middle", "recipe=middle", f"seed={seed}"]
    return {
        warm: ["verl_recipes.warm_start", f"name={warm}", f"seed={seed}", *WARM_START],
        f"middle-seed{seed}": [*run, f"name=middle-seed{seed}", f"warm_start=runs/{warm}"],
        f"middle-cold-seed{seed}": [*run, f"name=middle-cold-seed{seed}"],
    }


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
        models[name] = {key: figures[key] for key in FIGURES}
        samples[name] = read_lines(list(run.sample_files("validation").values())[place])
        models[name]["mean@8"] = compare(samples[name], samples[name])["first"]  # with its interval
    pairs = (("warm start", "both"), ("cold", "both"), ("base", "cold"))
    tests = {f"{one}, {other}": compare(samples[one], samples[other]) for one, other in pairs}
    curves = {
        name: [fmean(row["acc"] for row in read_lines(file)) for file in run.sample_files("train").values()]
        for name, run in (("cold", cold), ("both", after_warm_start))
    }
    about = read_json(after_warm_start.summary, "")
    kept = {key: about[key] for key in ("git_commit", "versions", "seconds")}
    return {"models": models, "tests": tests, "curves": curves} | kept


def main(seeds: list[str]) -> None:
    for seed in map(int, seeds):
        target = RESULTS / "middle" / f"seed{seed}.json"
        if target.exists():
            continue
        commands = commands_of(seed)
        for command in commands.values():
            print("python -m", *command, flush=True)
            subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
        result = {"commands": [" ".join(["python -m", *command]) for command in commands.values()]} | measured(seed)
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {target}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["0", "1", "2"])
