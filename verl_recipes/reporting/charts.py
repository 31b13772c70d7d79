"""The charts of a report: which metrics each shows, and lines for one run or a band for several seeds."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any, NamedTuple

from verl_recipes.measure.behaviours import BEHAVIOURS
from verl_recipes.reporting.metrics import DISAGREEMENT, Curve
from verl_recipes.reporting.run import Run
from verl_recipes.run.fingerprint import comparable

POINTS = 1_000  # of a curve

DEGENERATE = ("groups_without_signal", "identical", "repeated", "unparsable")


class Chart(NamedTuple):
    """Title, unit, and patterns for the names of the metrics.

    A pattern that begins with "-" excludes names. Of "a|b", only the first pattern that matches counts.
    """

    title: str
    unit: str
    patterns: list[str]


CHARTS = [
    Chart("Accuracy by test set", "share", ["val-core/*/acc/mean@*"]),
    Chart("Reward, training batch", "reward", ["reward/score|critic/score/mean"]),
    Chart(
        "Components of the reward",
        "mean",
        ["reward/*", "-reward/*/*", "-reward/score", *(f"-reward/{name}" for name in ("truncated", *DEGENERATE))],
    ),
    Chart("Reasons for failure", "share of responses", ["reward/reason/*"]),
    Chart("Response length", "tokens", ["response_length/mean"]),
    Chart("Truncated responses", "share", ["response_length/clip_ratio"]),
    Chart("KL divergence", "nats", ["actor/kl_loss", "actor/reward_kl_penalty", "actor/ppo_kl", "rollout_corr/kl"]),
    Chart("Entropy of the policy", "nats", ["actor/entropy|actor/entropy_loss"]),
    Chart("Gradient norm", "norm", ["actor/grad_norm", "critic/grad_norm"]),
    Chart("Groups without signal, and degenerate output", "share", [f"reward/{name}" for name in DEGENERATE]),
    Chart("Throughput", "tokens a second", ["perf/throughput"]),
    Chart("Seconds by part of a step", "seconds", ["timing_s/*"]),
    Chart("Disagreement of rollout and actor", "1 - correlation", ["|".join(DISAGREEMENT)]),
]
BEHAVIOUR_CHARTS = [
    Chart("Behaviours", "share of responses that show it", list(BEHAVIOURS)),
    Chart("Candidates tried, and repeated", "mean count", ["candidates", "repeats"]),
    Chart("True arithmetic", "share of statements", ["true arithmetic"]),
    Chart("Mixed language and degenerate ends", "share", ["language_mixing", "repetition"]),
]

# Keys that differ between two seeds of one recipe: the seeds, what the run is called, and how the command was started.
OF_ONE_RUN = re.compile(r"name|run_dir|fresh|force|plan\..+|(.+\.)?experiment_name|(.+[._])?seed")


def recipe_of(config: dict[str, Any]) -> str:
    """Equal for configurations that differ only by OF_ONE_RUN and by paths below the runs' folders."""
    settings = {key: value for key, value in comparable(config).items() if not OF_ONE_RUN.fullmatch(key)}
    return json.dumps(settings, sort_keys=True, default=str)


def thin(points: Curve) -> list[list[float]]:
    """Steps and values: at most POINTS, evenly chosen, and the last one."""
    items = sorted(points.items())
    chosen = items[:: math.ceil(len(items) / POINTS) or 1]
    if items and chosen[-1] != items[-1]:
        chosen.append(items[-1])
    return [[step for step, _ in chosen], [float(f"{value:.6g}") for _, value in chosen]]


def chosen_names(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that match a pattern and none with "-", in the order of the patterns."""
    names, excluded = sorted(names), [pattern[1:] for pattern in patterns if pattern.startswith("-")]
    wanted = []
    for pattern in patterns:
        matches = ([name for name in names if fnmatchcase(name, each)] for each in pattern.split("|"))
        wanted += next(filter(None, matches), [])
    return [name for name in dict.fromkeys(wanted) if not any(fnmatchcase(name, pattern) for pattern in excluded)]


def line(curves: Sequence[Curve]) -> dict[str, list[float]]:
    """Steps `x` and values `y` of one run. For several runs, their mean, and `low` and `high` of a band."""
    values: dict[int, list[float]] = defaultdict(list)
    for curve in curves:
        for step, value in curve.items():
            values[step].append(value)
    steps, means = thin({step: fmean(each) for step, each in values.items()})
    if len(curves) == 1:
        return {"x": steps, "y": means}
    low, high = (thin({step: end(each) for step, each in values.items()})[1] for end in (min, max))
    return {"x": steps, "y": means, "low": low, "high": high}


def charts(runs: Sequence[Run], missing: list[str]) -> list[dict[str, Any]]:
    """The charts of the page, where several seeds are one line with a band. `missing` gets those without a line."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[recipe_of(run.config) if run.config else str(run.folder.path.resolve())].append(run)
    result = []
    for kind, specifications in (("metric", CHARTS), ("behaviour", BEHAVIOUR_CHARTS)):
        for title, unit, patterns in specifications:
            lines = []
            for number, members in enumerate(groups.values()):
                recorded = [run.curves if kind == "metric" else run.behaviours for run in members]
                label = members[0].name if len(members) == 1 else f"{members[0].name} and {len(members) - 1} more seeds"
                names = {name for curves in recorded for name, curve in curves.items() if curve}
                lines += [
                    {"name": name, "run": label if len(runs) > 1 else "", "group": number}
                    | line([curves.get(name, {}) for curves in recorded])
                    for name in chosen_names(patterns, names)
                ]
            if lines:
                result.append({"title": title, "unit": unit, "kind": kind, "lines": lines})
            else:
                missing.append(f"{title}: none of {', '.join(p for p in patterns if p[0] != '-')} was recorded")
    return result
