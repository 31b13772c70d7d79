"""The picture of a run: reward, accuracy, response length and agreement over the steps."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt

from verl_recipes.measure.summary import AGREEMENT

PANELS = {  # title: metrics of verl's, or of the run's sampler
    "reward, training batch": ["critic/score/mean"],
    "share right and well formed": ["reward/acc", "reward/format"],
    "response tokens": ["response_length/mean"],
    "share truncated; groups without signal": ["response_length/clip_ratio", "reward/groups_without_signal"],
    "1 - correlation of rollout and actor": AGREEMENT,
    "seconds a step": ["timing_s/step", "timing_s/gen", "timing_s/update_actor"],
}


def draw(run_dir: Path, title: str) -> Path:
    """Write curves.png from metrics.jsonl; returns its path."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for axis, (name, metrics) in zip(axes.flat, PANELS.items(), strict=True):
        for metric in metrics:
            points = [(line["step"], line["data"][metric]) for line in lines if metric in line["data"]]
            if name.startswith("1 - "):
                points = [(step, 1 - value) for step, value in points]
            if points:
                axis.plot(*zip(*points, strict=True), label=metric)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(title)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
