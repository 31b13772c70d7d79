"""What a run's page says first: what happened in two sentences, and one problem before and after."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from verl_recipes.measure.evaluation import candidates
from verl_recipes.measure.intervals import figure
from verl_recipes.measure.problems import Key, Row, finite, numbers_and_target
from verl_recipes.reporting.run import Run, as_read, gains, marked

Pair = tuple[Mapping[Key, float], Mapping[Key, float]]
LESS, MORE = 0.8, 1.25  # a ratio between them is no change worth a sentence


def of_100(share: float) -> str:
    """A share as a reader counts it.

    >>> of_100(0.223), of_100(0.004), of_100(0.0)
    ('22', '0.4', '0')
    """
    return f"{100 * share:.1g}" if 0 < share < 0.01 else f"{100 * share:.0f}"


def pair_of(run: Run, name: str) -> Pair | None:
    """A figure at each problem of the first and of the last test; None unless both have it."""
    if len(run.figures) < 2:
        return None
    before, after = (next((each for key, each in side.items() if key.startswith(name)), {}) for side in run.figures)
    return (before, after) if before and after else None


def what_changed(run: Run, before: Mapping[Key, float], after: Mapping[Key, float]) -> tuple[str, str]:
    """The sentence about right answers, and how sure it is."""
    was, now = of_100(fmean(before.values())), of_100(fmean(after.values()))
    _, low, high = (100 * each for each in figure(gains(before, after) or [0.0], share=False))
    start = f"From {was} to {now} of 100 test problems right" if was != now else f"{now} of 100 test problems right"
    sentence = f"{start} after {run.evaluated[-1]} steps of training"
    if not math.isfinite(low):
        return f"{sentence}.", "There are too few problems for an interval."
    sure = f"95% interval of the gain: {low:+.0f} to {high:+.0f}, over {len(after)} problems."
    if low <= 0 <= high:
        return f"{sentence}: no difference that the test can tell from chance.", sure
    return f"{sentence}{': the model got worse' if high < 0 else ''}.", sure


def how_it_changed(run: Run) -> str:
    """The sentence about what the model does otherwise; "" if nothing is known of it."""
    for name, verb, what in (("candidates", "tries", "equations"), ("response_tokens", "writes", "tokens")):
        pair = pair_of(run, name)
        was, now = (fmean(each.values()) for each in pair) if pair else (0.0, 0.0)
        if not was:
            continue
        if LESS < now / was < MORE:
            return f"It {verb} about as many {what} as before, {now:.1f} a response."
        times = f"{now / was:.1f} times as many" if now > was else f"only {now / was:.0%} as many"
        return f"It now {verb} {times} {what} before it answers: {now:.1f} instead of {was:.1f}."
    return ""


def so_far(run: Run) -> str:
    """The sentence of a run without two tests to compare: its training."""
    steps = sorted(run.training)
    if not steps or "acc" not in run.judged:
        return ""
    first, last = (of_100(run.training[step][0]) for step in (steps[0], steps[-1]))
    if len(steps) == 1:
        return f"In the first step of training {first} of 100 responses are right."
    return f"In training {first} of 100 responses were right in step {steps[0]}, and {last} in step {steps[-1]}."


def story(run: Run) -> tuple[list[str], str]:
    """The sentences, and how sure the first of them is."""
    said = []
    if run.state != "complete":
        said.append(f"The run {run.state}: {run.steps} of {run.planned or 'an unknown number of'} steps are done.")
    elif run.summary.get("early_end"):
        said.append(f"The run ended after {run.steps} of {run.planned} steps, as its tests got no better any more.")
    if pair := pair_of(run, "mean@"):
        sentence, sure = what_changed(run, *pair)
        return [*said, sentence, *filter(None, [how_it_changed(run)])], sure
    if pair := pair_of(run, "score"):
        was, now = (fmean(each.values()) for each in pair)
        return [*said, f"The mean reward on the test problems went from {was:.3g} to {now:.3g}."], ""
    sure = ""
    for curve in list(run.tests.values())[:1] if "acc" in run.judged else ():
        step, (mean, low, high) = next(iter(curve.items()))
        when = "Before training" if step == 0 else f"At step {step}"
        said.append(f"{when} the model got {of_100(mean)} of 100 test problems right.")
        sure = f"95% interval of the test: {of_100(low)} to {of_100(high)}."
    return [*said, *filter(None, [so_far(run)])] or ["Nothing has been measured yet."], sure


def example(run: Run) -> dict[str, Any] | None:
    """One test problem before and after: wrong at first and right at last, and otherwise as usual as can be.

    Only the first response to each problem is looked at. Of the problems whose response was wrong and became right, the
    one is taken that tries a number of equations closest to the mean of all. If there is none, any problem will do.
    """
    if len(run.evaluations) < 2:
        return None
    before, after = run.evaluations
    both = [(before[key][0], after[key][0]) for key in before if key in after and numbers_and_target(before[key][0])]
    turned = [pair for pair in both if [finite(row.get("acc")) for row in pair] == [0, 1]]
    if not both:
        return None
    usual = [fmean(each.get("candidates", {}).values() or [0.0]) for each in run.figures]

    def distance(pair: tuple[Row, Row]) -> float:
        tried = [candidates(as_read(row)) or 0 for row in pair]
        return sum(abs(math.log((1 + one) / (1 + mean))) for one, mean in zip(tried, usual, strict=True))

    chosen = min(turned or both, key=distance)
    problem = numbers_and_target(chosen[0])
    assert problem
    sides = [
        {"step": step, "right": finite(row.get("acc")) == 1, "reason": str(row.get("reason", "")), "parts": marked(row)}
        for step, row in zip(run.evaluated, chosen, strict=True)
    ]
    return {"numbers": problem[0], "target": problem[1], "sides": sides, "turned": bool(turned)}
