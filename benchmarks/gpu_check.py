"""python benchmarks/gpu_check.py RUN...: compares runs on a GPU with their plan, for launch/gpu_check.sh.

Memory is torch's in the training process (verl's perf/ metrics), so plan's context, vLLM and fragments are left out.
Seconds are means over the steps after the first.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

from omegaconf import OmegaConf

from verl_recipes.planning.estimate import estimate
from verl_recipes.planning.memory import GIB

TIMES = {  # verl's metrics for each part of plan
    "generate": ["timing_s/gen"],
    "old log-probabilities": ["timing_s/old_log_prob"],
    "reference": ["timing_s/ref"],
    "values and critic": ["timing_s/values", "timing_s/update_critic"],
    "update": ["timing_s/update_actor"],
    "weights, sleep and wake": ["timing_s/update_weights"],
    "step": ["timing_s/step"],
}
NOT_TORCHS = ("context", "vllm asleep", "fragments")


def rows(run: Path) -> list[tuple[str, float, float]]:
    """(what, plan's, measured) of a run folder."""
    lines = [json.loads(line)["data"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [data for data in lines if "training/global_step" in data]
    found = estimate(OmegaConf.load(run / "config.yaml"))
    passes = [parts for phase, parts in found["memory"].items() if phase not in ("generate", "weights to vllm")]
    planned = max(sum(size for name, size in parts.items() if name not in NOT_TORCHS) for parts in passes)
    result = [("GiB at the peak of training", planned / GIB, max(d["perf/max_memory_allocated_gb"] for d in steps))]
    for part, metrics in TIMES.items():
        seen = [sum(data.get(name, 0.0) for name in metrics) for data in steps[1:] or steps]
        if part in found["seconds"] and any(seen):
            result.append((f"seconds: {part}", found["seconds"][part], fmean(seen)))
    return result


if __name__ == "__main__":
    for run in map(Path, sys.argv[1:]):
        if not (run / "metrics.jsonl").exists():
            print(f"{run}: no metrics")
            continue
        print(f"| {run} | plan | measured | difference |\n| --- | --- | --- | --- |")
        for what, plan, seen in rows(run):
            print(f"| {what} | {plan:.1f} | {seen:.1f} | {plan / seen - 1:+.0%} |")
