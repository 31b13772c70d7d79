"""Goodput: the share of the time of all of a run's starts that went into steps which count."""

import math
from itertools import pairwise
from typing import Any

from verl_recipes.run.folder import RunFolder, read_lines

CORRECTION = 1  # seconds by which a time server may set the clock back, which changes no figure
Session = tuple[float, float, list[dict[str, Any]]]  # when verl was started, when it ended, when it began to generate


def recorded(run: RunFolder) -> list[list[dict[str, Any]]]:
    """What verl did, and its starts and ends."""
    return [read_lines(path, skip_damaged=True) for path in (run.events, run.starts)]


def sessions(events: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[Session]:
    """Every start of verl. One that was killed ended with the last thing that it is known to have done."""
    began = [line["time"] for line in lines if line["event"] == "began"]
    ended = [line["time"] for line in lines if line["event"] == "ended"]
    found = []
    for start, following in pairwise([*began, math.inf]):
        within = [event for event in events if start <= event["time"] < following]
        known = [time for time in ended if start <= time < following] or [each["time"] for each in within[-1:]]
        found.append((start, (known or [start])[0], [each for each in within if each["event"] == "generating"]))
    return found


def goodput(run: RunFolder) -> dict[str, float]:
    """Seconds of all starts by what they went into, and `share`, that of `steps`; empty if that is not known.

    `start` is until the first rollouts of each start, `saves` are checkpoints, `lost` are steps that were done again
    because the run was killed before their checkpoint.
    """
    parts = dict.fromkeys(("steps", "start", "evaluations", "saves", "lost"), 0.0)
    records = recorded(run)
    starts = sessions(*records)
    in_order = [[line["time"] for line in lines] for lines in records]
    in_order += [[mark["time"], ended] for _, ended, marks in starts for mark in marks]
    if any(before > after + CORRECTION for times in in_order for before, after in pairwise(times)):
        return {}  # the clock was set back, so nothing is known
    trained = ((place, mark) for place, (*_, marks) in enumerate(starts) for mark in marks if mark["split"] == "train")
    counts = {mark["step"]: place for place, mark in trained}  # the start in which a step was done last
    for place, (began, ended, marks) in enumerate(starts):
        parts["start"] += (marks[0]["time"] if marks else ended) - began
        for mark, following in pairwise([*marks, {"time": ended}]):
            training = "steps" if counts.get(mark["step"]) == place else "lost"
            parts[training if mark["split"] == "train" else "evaluations"] += following["time"] - mark["time"]
    data = [line["data"] for line in read_lines(run.metrics, skip_damaged=True)]
    parts["saves"] = min(parts["steps"], sum(each.get("timing_s/save_checkpoint", 0.0) for each in data))
    parts["steps"] -= parts["saves"]
    total = sum(parts.values())
    return {"share": parts["steps"] / total} | parts if total and min(parts.values()) >= 0 else {}
