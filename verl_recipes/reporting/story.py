"""What a page says first: what happened in two sentences, and one problem before and after."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from verl_recipes.measure.comparison import difference_of
from verl_recipes.measure.intervals import figure
from verl_recipes.measure.problems import Key, Row, finite, numbers_and_target
from verl_recipes.reporting.charts import in_groups, label_of
from verl_recipes.reporting.run import Run, found_in, gains, lookup, marked

Sides = list[Mapping[Key, float]]  # a figure at each problem, for each evaluation
LESS, MORE = 0.8, 1.25  # a ratio between them is no change worth a sentence
RECIPES = 4  # that a page of several has a sentence for


def of_100(share: float) -> str:
    """A share as a reader counts it.

    >>> of_100(0.223), of_100(0.004), of_100(0.0), of_100(0.996), of_100(1.0)
    ('22', '0.4', '0', '99.6', '100')
    """
    if 0.99 < share < 1:
        return f"{min(99.9, 100 * share):.1f}"
    return f"{100 * share:.1g}" if 0 < share < 0.01 else f"{100 * share:.0f}"


def sides_of(run: Run, name: str) -> Sides:
    """A figure at each problem of each evaluation; empty unless there are two or more and all have it."""
    sides = [next((each for key, each in side.items() if key.startswith(name)), {}) for side in run.figures]
    return list(sides) if len(sides) > 1 and all(sides) else []


def from_to(was: float, now: float) -> str:
    """The start of a sentence about right answers, from shares."""
    before, after = of_100(was), of_100(now)
    return f"{f'From {before} to ' if before != after else ''}{after} of 100 test responses right"


def gain_of(gained: Sequence[float], of_seeds: bool = False) -> tuple[str, str]:
    """What the 95% interval of a gain says of it, "" for a gain, and the interval; "" if there is none.

    Args:
        gained: the gain at each problem, or of each seed.
    """
    found = figure(gained or [0.0], share=False) if of_seeds or len(gained) < 2 else difference_of(gained)
    _, low, high = (100 * each for each in found)
    if not math.isfinite(low):
        return "", ""
    digits = 1 if min(abs(low), abs(high)) < 0.5 else 0  # an end that rounds to 0 would hide on which side it is
    doubt = "no difference that the test can tell from chance" if low <= 0 <= high else ""
    return doubt or ("the model got worse" if high < 0 else ""), f"{low:+.{digits}f} to {high:+.{digits}f}"


def what_changed(run: Run, sides: Sides) -> tuple[str, str]:
    """The sentence about right answers, and how sure it is. Only evaluations (`Run.measured`) may be more than two."""
    means, whose = [fmean(each.values()) for each in sides], run.called[1:]
    if not run.measured:
        steps = run.evaluated[-1]
        whose = [f"after {steps} step{'s' * (steps != 1)} of training"]
    verdicts, ends = zip(*(gain_of(gains(*pair)) for pair in pairwise(sides)), strict=True)
    if len(sides) == 2:
        said = f"{from_to(*means)} {whose[0]}{': ' if verdicts[0] else ''}{verdicts[0]}."
    else:
        rungs = [f"{name}{f' ({verdict})' if verdict else ''}" for name, verdict in zip(whose, verdicts, strict=True)]
        later = [f", then to {of_100(mean)} {rung}" for mean, rung in zip(means[2:], rungs[1:], strict=True)]
        said = f"{from_to(*means[:2])} {rungs[0]}{''.join(later)}."
    if not all(ends):
        return said, "There are too few problems for an interval."
    named = ends if len(sides) == 2 else [f"{each} {name}" for each, name in zip(ends, whose, strict=True)]
    return said, f"95% interval of the gain: {', '.join(named)}, over {len(sides[-1])} problems."


def how_it_changed(run: Run) -> str:
    """The sentence about what the model does otherwise; "" if nothing is known of it."""
    for name, verb, what in (("candidates", "tries", "equations"), ("response_tokens", "writes", "tokens")):
        sides = sides_of(run, name)
        was, now = (fmean(each.values()) for each in (sides[0], sides[-1])) if sides else (0.0, 0.0)
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


def learned(run: Run) -> list[str]:
    """The sentence of a warm start, if its loss was measured."""
    losses = run.curves.get("val/loss")
    if not losses:
        return []
    first, best = min(losses), min(losses, key=lambda step: (losses[step], step))
    start = f"The loss on traces that are held out was {losses[first]:.3g} at step {first}"
    end = f"{losses[best]:.3g} at step {best}, which was kept" if best > first else "no less later"
    return [f"{start}, and {end}."]


def how_it_ended(run: Run) -> list[str]:
    """The sentence about a run that has not done all its steps."""
    if run.state != "complete":
        return [f"The run {run.state}: {run.steps} of {run.planned or 'an unknown number of'} steps are done."]
    if run.summary.get("early_end") and run.steps < run.planned:  # the last planned test may also be the one too many
        return [f"The run ended after {run.steps} of {run.planned} steps, as its tests got no better any more."]
    return []


def story(run: Run) -> tuple[list[str], str]:
    """The sentences, and how sure the first of them is."""
    said = how_it_ended(run)
    if sides := sides_of(run, "mean@"):
        sentence, sure = what_changed(run, sides)
        return [*said, sentence, *filter(None, [how_it_changed(run)])], sure
    if sides := sides_of(run, "score"):
        was, now = (fmean(each.values()) for each in (sides[0], sides[-1]))
        return [*said, f"The mean reward on the test problems went from {was:.3g} to {now:.3g}."], ""
    if run.is_warm_start:
        return [*said, *learned(run)] or ["Nothing has been measured yet."], ""
    sure = ""
    found = [each for side in run.figures[:1] for name, each in side.items() if name.startswith("mean@") and each]
    for each in found:  # of all test sets in distribution, as the sentence about two tests
        mean, low, high = figure(each.values())
        when = f"At step {run.evaluated[0]} the" if run.evaluated[0] else "Before training the"
        said.append(f"{'The' if run.is_evaluation else when} model got {of_100(mean)} of 100 test responses right.")
        sure = f"95% interval of the test: {of_100(low)} to {of_100(high)}."
    return [*said, *filter(None, [so_far(run)])] or ["Nothing has been measured yet."], sure


def of_recipe(members: Sequence[Run]) -> tuple[str, str, str]:
    """Of runs that differ by their seed alone: whom the sentence is about, the sentence, and how sure it is.

    It is of the mean, if two seeds or more have both tests; a seed that occurs twice counts once. Else it is one run's.
    """
    ended = (run for run in members if run.state == "complete")  # the last test of another run is of an earlier step
    measured = {lookup(run.config, "seed"): sides for run in ended if (sides := sides_of(run, "mean@"))}
    if len(measured) < 2:
        one = next((run for run in members if sides_of(run, "mean@")), members[0])
        sentences, sure = story(one)
        return one.name, " ".join(sentences[: len(how_it_ended(one)) + 1]), sure
    means = [[fmean(each.values()) for each in (sides[0], sides[-1])] for sides in measured.values()]
    gained = [now - was for was, now in means]
    verdict, ends = gain_of(gained, of_seeds=True)
    end = f": {verdict.replace('the test', 'the seeds')}." if verdict else "."
    least, most = (100 * each(gained) for each in (min, max))
    sure = f"95% interval of the gain, over seeds: {ends}; the seeds gained {least:+.0f} to {most:+.0f}."
    said = f"{from_to(*map(fmean, zip(*means, strict=True)))}, the mean of {len(means)} seeds{end}"
    return label_of(members), said, sure


def stories(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """The sentences of a page, and how sure they are: of one run, or a sentence a recipe."""
    if len(runs) == 1:
        sentences, sure = story(runs[0])
        return sentences, [sure] if sure else []
    groups = in_groups(runs)
    told = [of_recipe(members) for members in groups[:RECIPES]]
    if len(groups) == 1 and told[0][0] == label_of(runs):
        return [told[0][1]], [told[0][2]]
    sentences = [f"{name}: {sentence[:1].lower()}{sentence[1:]}" for name, sentence, _ in told]
    more = [f"The table has {len(groups) - RECIPES} recipes more."] if len(groups) > RECIPES else []
    return sentences + more, [f"{name}: {sure}" for name, _, sure in told if sure]


def example(run: Run) -> dict[str, Any] | None:
    """One test problem and an answer of each model: wrong at first and right at last, and as usual as can be.

    Only the first response to each problem is looked at. Of the problems whose response was wrong and became right, the
    one is taken that tries a number of equations closest to the mean of all. If there is none, any problem will do.
    """
    if len(run.evaluations) < 2:
        return None
    before, *after = run.evaluations
    common = [key for key, rows in before.items() if numbers_and_target(rows[0]) and all(key in each for each in after)]
    answers = [[each[key][0] for each in run.evaluations] for key in common]
    turned = [rows for rows in answers if [finite(rows[i].get("acc")) for i in (0, -1)] == [0, 1]]
    if not answers:
        return None
    usual = [fmean(each.get("candidates", {}).values() or [0.0]) for each in run.figures]

    def distance(rows: Sequence[Row]) -> float:
        tried = [sum(each["candidates"] for each in found_in([row])) for row in rows]
        return sum(abs(math.log((1 + one) / (1 + mean))) for one, mean in zip(tried, usual, strict=True))

    chosen = min(turned or answers, key=distance)
    problem = numbers_and_target(chosen[0])
    assert problem
    sides = [
        {
            "whose": whose,
            "right": finite(row.get("acc")) == 1,
            "reason": str(row.get("reason", "")),
            "parts": marked(row),
        }
        for whose, row in zip(run.called, chosen, strict=True)
    ]
    return {"numbers": problem[0], "target": problem[1], "sides": sides, "turned": bool(turned)}
