"""The picture of a run: reward, accuracy, response length and disagreement over the steps."""

from pathlib import Path

from verl_recipes.reporting.metrics import DISAGREEMENT, curves_of, read_metrics
from verl_recipes.run.folder import RunFolder

PANELS = {
    "reward, training batch": ["critic/score/mean"],
    "share right and well formed": ["reward/acc", "reward/format"],
    "response tokens": ["response_length/mean"],
    "share truncated; groups without signal": ["response_length/clip_ratio", "reward/groups_without_signal"],
    "1 - correlation of rollout and actor": DISAGREEMENT,
    "seconds a step": ["timing_s/step", "timing_s/gen", "timing_s/update_actor"],
}


def draw(run_dir: Path, title: str) -> Path:
    """Write curves.png from the metrics that the run has; returns its path."""
    from matplotlib.figure import Figure  # slow to import; unlike pyplot it needs no screen

    run = RunFolder(run_dir)
    curves = curves_of(read_metrics(run))
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (name, metrics) in zip(axes.flat, PANELS.items(), strict=True):
        recorded = [metric for metric in metrics if metric in curves]
        for metric in recorded:
            axis.plot(*zip(*sorted(curves[metric].items()), strict=True), label=metric.removeprefix("1 - "))
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        if recorded:
            axis.legend(fontsize=7)
        else:
            axis.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axis.transAxes, color="gray")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(title, parse_math=False)  # a name may hold dollar signs
    figure.savefig(run.curves, dpi=110)
    return run.curves
