"""What a batch of scored responses says of the run, as metrics; and the end of a run whose output has degenerated.

One entry of `rows` is a line of samples/ (verl_recipes/in_verl/sampler.py). The limits lie in configs/train.yaml, under
`trainer.v1.sampler.sampler_kwargs.alarm`.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_recipes.run.checkpoints import checkpoint_steps


class DegenerateOutputError(RuntimeError):
    """Ends verl; verl_recipes.run.preflight.reason finds it in the log."""


def component_metrics(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Means of the reward's components over a batch, and the shares of what gives the trainer nothing to learn from.

    Args:
        rows: samples, those of one prompt sharing `prompt_id`.
        prefix: of the metrics' names.

    Returns:
        The mean of each float or bool in the rows (with the reward's reasons, `truncated` and `repeated`);
        `unparsable`, the share whose answer is no expression, where the reward says `format`; `identical`, the share
        of responses that another one before them in the batch equals; `groups_without_signal`, the share of groups
        whose rewards do not differ, so that their advantages are zero.
    """
    names = [name for name, value in rows[0].items() if isinstance(value, float | bool)]
    metrics = {name: statistics.fmean(row[name] for row in rows) for name in names}
    if "format" in metrics:
        metrics["unparsable"] = 1 - metrics["format"]
    metrics["identical"] = 1 - len({row["response"] for row in rows}) / len(rows)
    groups = defaultdict(set)
    for row in rows:
        groups[row["prompt_id"]].add(row["score"])
    metrics["groups_without_signal"] = statistics.fmean(len(scores) == 1 for scores in groups.values())
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def last_good_checkpoint(checkpoints: Path, first_bad_step: int) -> Path | None:
    """The last checkpoint whose own output was good: the weights of step k wrote the responses of step k + 1."""
    good = [step for step in checkpoint_steps(checkpoints) if step + 1 < first_bad_step]
    return checkpoints / f"global_step_{max(good)}" if good else None


def check_output(
    history: Mapping[int, Mapping[str, float]], limits: Mapping[str, float | None], steps: int, checkpoints: Path
) -> None:
    """Raise DegenerateOutputError where one share reached its limit at each of the last `steps` training steps.

    Args:
        history: for each training step, metrics as from `component_metrics` with the prefix "reward".
        limits: for names of shares, the least that is too much; None for never. A share that no step has is 0.
        steps: how many in a row.
        checkpoints: the run's folder of them, to name the last good one.
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
