"""Ends a run whose output has degenerated, according to the metrics of measure/batch.py.

The limits are in configs/train.yaml, under `trainer.v1.sampler.sampler_kwargs.alarm`.
"""

from collections.abc import Mapping
from pathlib import Path

from verl_recipes.run.checkpoints import checkpoint_steps


class DegenerateOutputError(RuntimeError):
    """Ends verl; verl_recipes/run/log.py finds it in the log."""


def check_signal(dropped: int, most: int) -> None:
    """Raise DegenerateOutputError if dynamic sampling dropped `most` groups in a step; 0 is for any number."""
    if 0 < most <= dropped:
        raise DegenerateOutputError(
            f"no signal: the responses of {dropped} groups of this step were all right or all wrong. Take easier or "
            "harder problems, a warm start, or a recipe without dynamic sampling; "
            "algorithm.filter_groups.max_num_gen_batches=0 generates without end"
        )


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
            # The weights of step k write the responses of step k + 1.
            good = (step for step in checkpoint_steps(checkpoints) if step + 1 < last[0])  # newest first
            place = next((checkpoints / f"global_step_{step}" for step in good), "none")
            raise DegenerateOutputError(
                f"the output has degenerated: reward/{name} was {limit:g} or more at {steps} steps in a row, from step "
                f"{last[0]} on; last good checkpoint: {place}; "
                f"trainer.v1.sampler.sampler_kwargs.alarm.limits.{name}=null turns this alarm off"
            )
