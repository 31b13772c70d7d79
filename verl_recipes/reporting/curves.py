"""The picture of a run, curves.png: what its metrics alone show."""

from pathlib import Path

from verl_recipes.reporting.charts import CHARTS, finished, lines_of
from verl_recipes.reporting.metrics import curves_of, read_metrics
from verl_recipes.run.folder import RunFolder

PANELS = ("reward", "well_formed", "response_tokens", "without_signal", "agreement", "parts_of_step")  # by term


def draw(run_dir: Path, title: str) -> Path:
    """Write curves.png from the metrics that the run has; returns its path."""
    from verl_recipes.reporting.draw import picture

    run = RunFolder(run_dir)
    curves = curves_of(read_metrics(run))
    chosen = sorted((chart for chart in CHARTS if chart.term in PANELS), key=lambda chart: PANELS.index(chart.term))
    picture([finished(chart, "metric", lines_of(chart, [curves])) for chart in chosen], title, run.curves)
    return run.curves
