"""Metrics of a batch of scored responses. A row is a line of samples/ (in_verl/sampler.py)."""

import statistics
from collections import defaultdict
from typing import Any


def component_metrics(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Means of the reward's components over a batch, and the shares of responses that the trainer cannot learn from.

    Args:
        rows: samples; those of one prompt share `prompt_id`.
        prefix: of the metrics' names.

    Returns:
        The mean of each float or bool over the rows that have it, so also of the reasons, `truncated` and `repeated`;
        `unparsable`, the share whose answer is no expression, if the reward gives `format`; `identical`, the share of
        responses that equal a response to another prompt; `groups_without_signal`, the share of groups whose rewards
        are all the same, so that their advantages are zero.
    """
    known: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float | bool):
                known[name].append(value)
    metrics = {name: statistics.fmean(each) for name, each in known.items()}
    if "format" in metrics:
        metrics["unparsable"] = 1 - metrics["format"]
    prompts = defaultdict(set)
    for row in rows:
        prompts[row["response"]].add(row["prompt_id"])
    metrics["identical"] = statistics.fmean(len(prompts[row["response"]]) > 1 for row in rows)
    groups = defaultdict(set)
    for row in rows:
        groups[row["prompt_id"]].add(row["score"])
    metrics["groups_without_signal"] = statistics.fmean(len(scores) == 1 for scores in groups.values())
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
