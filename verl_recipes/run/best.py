"""The tests of a run so far: which was the best, and whether enough of them in a row brought nothing better."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from omegaconf import DictConfig

from verl_recipes.measure.problems import finite
from verl_recipes.run.folder import RunFolder, read_metrics


def mean_of_test(data: Mapping[str, Any], name: str = "") -> float | None:
    """The mean of a step's test in verl's metrics, over its test sets; None if the step has none.

    Args:
        data: verl's metrics of a step.
        name: "/acc" or "/reward"; "" for the one that verl counts, which is the accuracy if the reward has one.
    """
    found = [value for key, value in data.items() if key.startswith("val-core/") and f"{name}/mean@" in key]
    known = [each for each in map(finite, found) if each is not None]
    return fmean(known) if known else None


def evaluations(run: RunFolder) -> dict[int, float]:
    """The mean of each test after a step of training, by step. The base's is not among them."""
    found = {step: mean_of_test(data) for step, data in read_metrics(run, b'"val-core/').items() if step}
    return {step: mean for step, mean in found.items() if mean is not None}


def best_step(found: Mapping[int, float]) -> int:
    """The first step with the highest value, 0 for none."""
    return max(sorted(found), key=lambda step: found[step], default=0)


def is_enough(found: Mapping[int, float], patience: int | None) -> bool:
    """Whether the last `patience` values are no higher than an earlier one; never without patience.

    >>> is_enough({5: 0.2, 10: 0.4, 15: 0.3}, 2), is_enough({5: 0.2, 10: 0.4, 15: 0.3, 20: 0.4}, 2)
    (False, True)
    """
    return bool(patience) and sum(step > best_step(found) for step in found) >= (patience or 0)


def early_end(cfg: DictConfig, run: RunFolder) -> int:
    """The step after which the tests end the run, 0 if they do not."""
    patience = cfg.get("patience")
    found = evaluations(run) if patience else {}
    return max(found) if is_enough(found, patience) else 0


def last_step(cfg: DictConfig, run: RunFolder) -> int:
    """The step at which the run ends, as far as its tests tell by now."""
    return early_end(cfg, run) or int(cfg.trainer.total_training_steps)
