"""The metrics of a run by name and step: verl's, and those of the run's sampler."""

from collections import defaultdict
from typing import Any

from verl_recipes.measure.problems import finite

Curve = dict[int, float]  # step, value

# The correlation of the probabilities that rollout and actor give the same tokens: verl's metric, and the one of
# verl_recipes/in_verl/agreement.py, for an update that measures it itself.
AGREEMENT = ["training/rollout_actor_probs_pearson_corr", "actor/rollout_actor_probs_pearson_corr"]
DISAGREEMENT = [f"1 - {name}" for name in AGREEMENT]  # the form in which curves show small differences


def seconds_of(summary: dict[str, Any]) -> float | None:
    """The seconds that a run took: of all its starts, if it was continued. None if they are not known.

    If the clock was set back meanwhile, they may be negative, and then they are not known.
    """
    command, starts = (each if isinstance(each := summary.get(name), dict) else {} for name in ("seconds", "goodput"))
    of_starts = sum(finite(value) or 0.0 for part, value in starts.items() if part != "share")
    seconds = max(finite(command.get("total")) or 0.0, of_starts)
    return seconds if seconds > 0 else None


def curves_of(metrics: dict[int, dict[str, Any]]) -> dict[str, Curve]:
    """The finite values of each metric by step; AGREEMENT becomes DISAGREEMENT."""
    curves: dict[str, Curve] = defaultdict(dict)
    for step, data in metrics.items():
        for name, value in data.items():
            if (known := finite(value)) is None:
                continue
            if name in AGREEMENT:
                curves[f"1 - {name}"][step] = 1 - known
            else:
                curves[name][step] = known
    return dict(curves)
