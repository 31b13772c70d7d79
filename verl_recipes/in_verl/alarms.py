"""Ends a run whose output has degenerated, according to the metrics of measure/batch.py.

The limits are in configs/train.yaml, under `trainer.v1.sampler.sampler_kwargs.alarm`.
"""

from collections.abc import Mapping
from pathlib import Path

from verl_recipes.run.checkpoints import checkpoint_steps


class DegenerateOutputError(RuntimeError):
    """Ends verl; verl_recipes/run/log.py finds it in the log."""


def last_good_checkpoint(checkpoints: Path, first_bad_step: int) -> Path | None:
    """The last checkpoint whose own output was good. The weights of step k write the responses of step k + 1."""
    good = [step for step in checkpoint_steps(checkpoints) if step + 1 < first_bad_step]
    return checkpoints / f"global_step_{max(good)}" if good else None


def check_output(
    history: Mapping[int, Mapping[str, float]], limits: Mapping[str, float | None], steps: int, checkpoints: Path
) -> None:
    """Raise DegenerateOutputError if one share reached its limit at each of the last `steps` training steps.

    Args:
        history: for each training step, metrics as from `component_metrics`.
        limits: for each share, the least value that is too much; None for no limit. A missing share counts as 0.
        checkpoints: the run's folder of checkpoints, to name the last good one.
    """
    last = sorted(history)[-steps:]
    if len(last) < steps:
        return
    for name, limit in limits.items():
        if limit is not None and all(history[step].get(f"reward/{name}", 0.0) >= limit for step in last):
            raise DegenerateOutputError(
                f"the output has degenerated: reward/{name} was {limit:g} or more at {steps} steps in a row, from step "
                f"{last[0]} on; last good checkpoint: {last_good_checkpoint(checkpoints, last[0]) or 'none'}; "
                f"trainer.v1.sampler.sampler_kwargs.alarm.limits.{name}=null turns this alarm off"
            )
