"""The charts of a report: which metrics each shows, in which words, and what is said where nothing is to see."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any, NamedTuple

from verl_recipes.measure.behaviours import BEHAVIOURS
from verl_recipes.measure.intervals import Figure
from verl_recipes.reporting.metrics import DISAGREEMENT, Curve
from verl_recipes.reporting.run import Run
from verl_recipes.run.fingerprint import comparable

POINTS = 1_000  # of a curve

Line = dict[str, Any]


class Chart(NamedTuple):
    """What one chart shows.

    `lines` maps patterns for names of metrics to words: "" stands for the name's own last part, and "-" excludes the
    names. Of "a|b", only the first pattern that matches counts. The order decides the colours, which therefore are the
    same in every report. `term` is a key of terms.yaml. Values are multiplied by `scale`. Below `floor` a difference is
    rounding and not signal.
    """

    title: str
    unit: str
    term: str
    lines: dict[str, str]
    scale: float = 1
    floor: float = 0


OF_100 = "of 100 responses"
REASONS = {
    "no_answer": "no answer",
    "syntax": "no expression",
    "wrong_numbers": "other numbers",
    "wrong_value": "misses the target",
    "too_long": "too long to be read",
    "division_by_zero": "divides by zero",
    "right": "right",
    "unknown": "not stated",
}
DEGENERATE = {
    "reward/groups_without_signal": "groups without signal",
    "reward/unparsable": "answer is no expression",
    "reward/identical": "same response to another prompt",
    "reward/repeated": "repeats itself",
}
REWARDS = ("reward/score", "reward/reward_score", "reward/overlong_reward")
PARTS_ELSEWHERE = ("reward/*/*", *REWARDS, "reward/truncated", *DEGENERATE)
PARTS = {"reward/acc": "right", "reward/format": "well formed"} | dict.fromkeys(PARTS_ELSEWHERE, "-") | {"reward/*": ""}
KL = {
    "actor/kl_loss": "from the base model, in the loss",
    "actor/reward_kl_penalty": "from the base model, in the reward",
    "actor/ppo_kl": "of the policy before the update from the one after",
    "rollout_corr/kl": "of rollout engine from trainer",
}
SECONDS = {
    "timing_s/step": "whole step",
    "timing_s/gen": "writing responses",
    "timing_s/update_actor": "updating the policy",
    "timing_s/update_weights": "weights to the rollout engine",
    "timing_s/old_log_prob": "log-probabilities",
    "timing_s/adv": "advantages",
    "timing_s/ref": "log-probabilities of the base model",
    "timing_s/save_checkpoint": "saving a checkpoint",
    "timing_s/update_critic": "updating the model of values",
    "timing_s/values": "values",
    "timing_s/testing": "test",
    "timing_s/*": "",
}
STALE = {f"training/off_policy/trajectory_staleness/{name}": name for name in ("mean", "max")}
REWARD = {"reward/score|critic/score/mean": "reward", "reward/reward_score": "before the penalty for length"}
WRONG = {f"reward/reason/{name}": words for name, words in REASONS.items()} | {"reward/reason/*": ""}
AGREEMENT = ("Disagreement of rollout engine and trainer", "1 - correlation", "agreement")
CHARTS = [
    Chart("Reward in training", "points", "reward", REWARD),
    Chart("Parts of the reward", "mean × 100", "well_formed", PARTS, 100),
    Chart("Why answers are wrong", OF_100, "reasons", WRONG, 100),
    Chart("Response length", "tokens", "response_tokens", {"response_length/mean": "mean length"}),
    Chart("Responses cut off", OF_100, "truncated", {"response_length/clip_ratio": "cut off"}, 100),
    Chart("Groups without signal, degenerate output", "of 100", "without_signal", DEGENERATE, 100),
    Chart("KL divergence", "nats a token", "kl", KL, floor=1e-6),
    Chart("Entropy", "nats", "entropy", {"actor/entropy|actor/entropy_loss": "entropy"}),
    Chart("Gradient norm", "norm", "gradient", {"actor/grad_norm": "policy", "critic/grad_norm": "model of values"}),
    Chart("Throughput", "tokens a second and device", "throughput", {"perf/throughput": "throughput"}),
    Chart("Seconds of a step", "seconds", "parts_of_step", SECONDS),
    Chart("Staleness", "updates", "staleness", STALE),
    Chart(*AGREEMENT, {"|".join(DISAGREEMENT): "disagreement"}, floor=1e-6),
]
TRIED = {"candidates": "tried", "repeats": "of them tried before"}
SHOWN = dict(zip(BEHAVIOURS, ("verification", "backtracking", "setting subgoals", "working backwards"), strict=True))
BROKEN = {"language_mixing": "words in another language", "repetition": "ends in repetition"}
BEHAVIOUR_CHARTS = [
    Chart("Equations tried", "mean count a response", "equations_tried", TRIED),
    Chart("Behaviours", OF_100, "behaviours", SHOWN, 100),
    Chart("True arithmetic", "of 100 equations", "true_arithmetic", {"true arithmetic": "true"}, 100),
    Chart("Broken language", "of 100", "degenerate", BROKEN, 100),
]
LOSSES = {"train/loss": "a batch of traces", "val/loss": "traces that are held out"}
WARM_START = Chart("Loss of the warm start", "nats a token", "loss", LOSSES)
RIGHT = Chart("Right answers", OF_100, "first_try", {}, 100)

# Keys that differ between two seeds of one recipe: the seeds, what the run is called, and how the command was started.
OF_ONE_RUN = re.compile(r"name|run_dir|fresh|force|plan\..+|(.+\.)?experiment_name|(.+[._])?seed")


def recipe_of(config: dict[str, Any]) -> str:
    """Equal for configurations that differ only by OF_ONE_RUN and by paths below the runs' folders."""
    settings = {key: value for key, value in comparable(config).items() if not OF_ONE_RUN.fullmatch(key)}
    return json.dumps(settings, sort_keys=True, default=str)


def in_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ by their seed alone stand together."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[recipe_of(run.config) if run.config else str(run.folder.path.resolve())].append(run)
    return list(groups.values())


def thin(points: Curve) -> list[list[float]]:
    """Steps and values: at most POINTS, evenly chosen, and the last one."""
    items = sorted(points.items())
    chosen = items[:: math.ceil(len(items) / POINTS) or 1]
    if items and chosen[-1] != items[-1]:
        chosen.append(items[-1])
    return [[step for step, _ in chosen], [float(f"{value:.6g}") for _, value in chosen]]


def matches(name: str, pattern: str) -> bool:
    """Whether a name matches one of the alternatives of a pattern."""
    return any(fnmatchcase(name, each) for each in pattern.split("|"))


def chosen_names(lines: dict[str, str], names: Iterable[str]) -> dict[str, int]:
    """The names that a chart shows, each with the place of its colour."""
    barred = [pattern for pattern, words in lines.items() if words == "-"]
    chosen = dict[str, int]()
    for place, (pattern, words) in enumerate(each for each in lines.items() if each[1] != "-"):
        found = ([name for name in sorted(names) if fnmatchcase(name, each)] for each in pattern.split("|"))
        fresh = [name for name in next(filter(None, found), []) if name not in chosen]
        if not words:  # all the rest
            fresh = [name for name in fresh if not any(matches(name, each) for each in barred)]
        chosen |= {name: place + i for i, name in enumerate(fresh)}
    return chosen


def label(lines: dict[str, str], name: str) -> str:
    """What a reader sees as the name of a metric: its words, or the last part of the name."""
    found = (words for pattern, words in lines.items() if words not in ("", "-") and matches(name, pattern))
    return next(found, name.rpartition("/")[2].replace("_", " "))


def line(curves: Sequence[Curve], scale: float = 1) -> dict[str, Any]:
    """Steps `x` and values `y` of one run. For several runs, their mean, and `low` and `high` of a band.

    `most` is the largest magnitude of all values, also of those that `thin` leaves out.
    """
    values: dict[int, list[float]] = defaultdict(list)
    for curve in curves:
        for step, value in curve.items():
            values[step].append(value * scale)
    steps, means = thin({step: fmean(each) for step, each in values.items()})
    most = max((abs(value) for each in values.values() for value in each), default=0.0)
    if len(curves) == 1:
        return {"x": steps, "y": means, "most": most}
    low, high = (thin({step: end(each) for step, each in values.items()})[1] for end in (min, max))
    return {"x": steps, "y": means, "low": low, "high": high, "most": most}


def number(value: float) -> str:
    """A value as a reader wants it: three digits that count, and no exponent for what a person can count."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def instead(chart: Chart, each: Line) -> str:
    """What is said of a line that shows nothing; "" if it is worth drawing."""
    most, name = each["most"], f"{each['label']}{each['run'] and ', ' + each['run']}"
    if most <= chart.floor and chart.term == "agreement":
        within = f"to within {most:.0e}" if most else "exactly"
        whose = f"{each['run']}: " if each["run"] else ""
        return f"{whose}the probabilities of rollout engine and trainer correlate at 1 {within}, at every step"
    if most <= chart.floor:
        rounding = f" (below {chart.floor:.6f}, which is rounding)" if most else ""
        return f"{name}: 0 at every step{rounding}"
    if len(each["x"]) == 1:
        return f"{name}: {number(each['y'][0])} at step {each['x'][0]}, the only value"
    return ""


def finished(chart: Chart, kind: str, lines: Sequence[Line]) -> dict[str, Any]:
    """A chart for the page: lines to draw, and sentences about those that show nothing."""
    said = dict.fromkeys(filter(None, (instead(chart, each) for each in lines)))
    about = {"title": chart.title, "unit": chart.unit, "term": chart.term, "kind": kind}
    return about | {"lines": [each for each in lines if not instead(chart, each)], "said": list(said)}


def lines_of(chart: Chart, recorded: Sequence[dict[str, Curve]], group: int = 0, run: str = "") -> list[Line]:
    """The lines of a chart for one run, or for several that differ by their seed.

    Args:
        recorded: the curves of each run by name.
        group: the number of these runs among all.
        run: what they are called; "" if the page has no others.
    """
    names = {name for curves in recorded for name, curve in curves.items() if curve}
    lines = list[Line]()
    for name, place in chosen_names(chart.lines, names).items():
        drawn = line([curves.get(name, {}) for curves in recorded], chart.scale)
        if chart.term != "reward" or all(each["y"] != drawn["y"] for each in lines):  # a reward that nothing changed
            about = {"name": name, "label": label(chart.lines, name), "colour": place, "group": group, "run": run}
            about |= {"test": False, "look": None}
            lines.append(about | drawn)
    return lines


def label_of(members: Sequence[Run]) -> str:
    """The name of a run, or of several that differ by their seed."""
    more = len(members) - 1
    return members[0].name + (f" and {more} more seed{'s' * (more > 1)}" if more else "")


def charts(runs: Sequence[Run], missing: list[str]) -> list[dict[str, Any]]:
    """The charts of the page, where several seeds are one line with a band. `missing` gets those without a line."""
    result, groups = [], in_groups(runs)
    for kind, specifications in (("metric", CHARTS), ("behaviour", BEHAVIOUR_CHARTS)):
        for chart in specifications:
            lines = list[Line]()
            for group, members in enumerate(groups):
                recorded = [run.curves if kind == "metric" else run.behaviours for run in members]
                lines += lines_of(chart, recorded, group, label_of(members) if len(runs) > 1 else "")
            if lines:
                result.append(finished(chart, kind, lines))
            else:
                wanted = ", ".join(pattern for pattern, words in chart.lines.items() if words != "-")
                missing.append(f"{chart.title}: none of {wanted} was recorded")
    return result


def of_warm_starts(runs: Sequence[Run]) -> dict[str, Any]:
    """The losses of the warm starts that the runs begin with, or are."""
    found = {run.warm_start.path.resolve(): run.warm_curves for run in runs if run.warm_start}
    lines = list[Line]()
    for group, (folder, curves) in enumerate(found.items()):
        lines += lines_of(WARM_START, [curves], group, folder.name if len(found) > 1 else "")
    return finished(WARM_START, "warm", [each | {"test": each["name"] == "val/loss"} for each in lines])


def with_interval(figures: dict[int, Figure], scale: float) -> dict[str, list[float]]:
    """A line of figures, with `low` and `high` if all intervals are finite."""
    mean, low, high = ({step: each[i] for step, each in figures.items()} for i in range(3))
    drawn = line([mean], scale)
    if all(map(math.isfinite, [*low.values(), *high.values()])):
        drawn |= {"low": line([low], scale)["y"], "high": line([high], scale)["y"]}
    return drawn


def of_right(runs: Sequence[Run]) -> dict[str, Any]:
    """The curve that matters: right answers in training and on the test problems, with intervals.

    The band of one run is the 95% interval over the problems of each step; that of several seeds is from the least to
    the most.
    """
    lines = list[Line]()
    scored = any("score" in run.judged for run in runs)  # a reward without verdicts
    chart = RIGHT._replace(title="Reward", unit="points", term="reward", scale=1) if scored else RIGHT
    sets = sorted({name for run in runs for name in run.tests})
    for group, members in enumerate(in_groups(runs)):
        for name in ("train", *sets):
            figures = [run.training if name == "train" else run.tests.get(name, {}) for run in members]
            if any(figures):
                words = "in training" if name == "train" else "test problems" if len(sets) == 1 else f"test: {name}"
                about = {"name": name, "label": words, "colour": 0 if name == "train" else 1 + sets.index(name)}
                about |= {"group": group, "run": label_of(members) if len(runs) > 1 else ""}
                about |= {"test": name != "train", "look": None}
                means = [{step: each[0] for step, each in of_run.items()} for of_run in figures]
                one = len(members) == 1
                lines.append(about | (with_interval(figures[0], chart.scale) if one else line(means, chart.scale)))
    return {"title": chart.title, "unit": chart.unit, "term": chart.term, "kind": "right", "lines": lines, "said": []}
