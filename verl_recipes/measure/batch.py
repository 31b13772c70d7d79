"""A response's reward as columns of samples/, and the metrics of a batch of such rows (in_verl/sampler.py)."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import Any


def scored(verdict: Mapping[str, Any], trained_on: float) -> dict[str, Any]:
    """A reward function's verdict as columns of samples/.

    Args:
        verdict: verl's `reward_extra_info`: all that the function returned, or `acc` alone if it returned a number; and
            what verl's reward manager adds (`overlong_reward` of `dapo`).
        trained_on: the score that the trainer got. It differs from the function's own if the manager shapes it.

    Returns:
        `score`, the one that was trained on; `reward_score`, the function's own; the rest of the verdict; and always
        `acc`, between 0 and 1. If the function gives no `acc`, a score of 1 or more counts as right.

    Raises:
        ValueError: `acc` is not between 0 and 1, or the score is not finite.

    >>> scored({"score": 1.0, "acc": 1.0, "overlong_reward": -0.5}, 0.5)
    {'score': 0.5, 'reward_score': 1.0, 'acc': 1.0, 'overlong_reward': -0.5}
    >>> scored({"acc": -1.0}, -1.0)  # of a function that returned -1
    {'score': -1.0, 'reward_score': -1.0, 'acc': 0.0}
    """
    own = float(verdict.get("score", verdict.get("acc", trained_on)))
    if not (math.isfinite(own) and math.isfinite(trained_on)):
        raise ValueError(f"the reward must be a finite number in 32 bits, not {own:g} (trained on as {trained_on:g})")
    right = float(verdict["acc"]) if {"score", "acc"} <= verdict.keys() else float(own >= 1)
    if not 0 <= right <= 1:
        raise ValueError(f"the reward's `acc` must be a number from 0 to 1, not {right:g}")
    columns = {"score": round(trained_on, 6), "reward_score": own}  # verl stores this score in 32 bits
    return columns | {name: value for name, value in verdict.items() if name not in columns} | {"acc": right}


def component_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the reward's components over a batch, and the shares of responses that the trainer cannot learn from.

    Args:
        rows: samples; those of one prompt share `prompt_id`.

    Returns:
        By name, which begins with "reward/": the mean of each float or bool over the rows that have it, so also of the
        reasons, `truncated` and `repeated`; `unparsable`, the share whose answer is no expression, if the reward gives
        `format`; `identical`, the share of responses that equal a response to another prompt; `groups_without_signal`,
        the share of groups whose rewards are all the same, so that their advantages are zero. It is left out where
        each prompt has one response, which is no group.
    """
    known = defaultdict[str, list[float]](list)
    prompts, groups = defaultdict[str, set[str]](set), defaultdict[str, list[float]](list)
    for row in rows:
        prompts[row["response"]].add(row["prompt_id"])
        groups[row["prompt_id"]].append(row["score"])
        for name, value in row.items():
            if isinstance(value, float | bool):
                known[name].append(value)
    metrics = {name: statistics.fmean(each) for name, each in known.items()}
    if "format" in metrics:
        metrics["unparsable"] = 1 - metrics["format"]
    metrics["identical"] = statistics.fmean(len(prompts[row["response"]]) > 1 for row in rows)
    if several := [set(scores) for scores in groups.values() if len(scores) > 1]:
        metrics["groups_without_signal"] = statistics.fmean(len(scores) == 1 for scores in several)
    return {f"reward/{name}": value for name, value in metrics.items()}
