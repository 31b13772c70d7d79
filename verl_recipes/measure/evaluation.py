"""The figures of an evaluation: accuracy, pass@k, lengths and behaviour, over all problems and by kind."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, multimode
from typing import Any

import numpy as np

from data_prep.cli import UserError
from reward_score.figures import pass_at_k
from reward_score.grammar import MAX_EXPRESSION, REASONS, ExpressionError, parse
from verl_recipes.measure.behaviours import behaviours
from verl_recipes.measure.intervals import Figure, figure
from verl_recipes.measure.problems import (
    OUT,
    Key,
    Row,
    answer_of,
    by_problem,
    finite,
    in_distribution,
    least_samples,
    numbers_and_target,
    set_name,
    values,
)

Groups = Mapping[Key, Sequence[Row]]
PerProblem = dict[str, dict[Key, float]]  # figure, problem, value
COUNTED = 8  # samples of a problem whose candidates are counted, as a long response takes 20 ms and more
NO_SHARES = {"response_tokens", "candidates", "score"}  # figures that are not shares


def vote(row: Row) -> tuple[Any, ...] | None:
    """A response's vote: its expression, or the text of an answer that is no expression; None without an answer.

    >>> vote({"response": "</think><answer>(1 + 2)*3</answer>"}), vote({"response": "</think><answer>1 2+3</answer>"})
    ((1, 2, '+', 3, '*'), ('text', '1', '2+3'))
    """
    found = answer_of(row)[1]
    if found is None or found[1] - found[0] > MAX_EXPRESSION:
        return None
    answer = row["response"][slice(*found)]
    try:
        return tuple(parse(answer))
    except ExpressionError:
        return "text", *answer.split()


def majority(rows: Sequence[Row]) -> float:
    """Chance that the most frequent answer is right. A fair draw breaks ties; a response without an answer has no vote.

    Two answers are the same if they are the same expression, so white space and needless parentheses do not matter. The
    usual vote is on the value, but here every response knows the target.

    >>> rows = [{"response": f"</think><answer>{text}</answer>", "acc": text == "1+2"} for text in ("1+2", "2-1")]
    >>> majority(rows), majority([*rows, {"response": "</think><answer>1 + 2</answer>", "acc": 1.0}])
    (0.5, 1.0)
    """
    given = ((vote(row), finite(row.get("acc"))) for row in rows)
    votes = [(answer, verdict) for answer, verdict in given if answer is not None and verdict is not None]
    most = multimode(answer for answer, _ in votes)  # all of them, if several have the most votes
    return fmean([verdict for answer, verdict in votes if answer in most] or [0.0])


def candidates(row: Row) -> float | None:
    """How many candidates a response tries (measure/behaviours.py); None if the problem is not Countdown's."""
    problem, response = numbers_and_target(row), row.get("response")
    return behaviours(response, *problem)["candidates"] if problem and isinstance(response, str) else None


def means(groups: Groups, name: str) -> dict[Key, float]:
    """For each problem, the mean of what its samples have under this name; problems without any are left out."""
    return {key: fmean(found) for key, group in groups.items() if (found := values(group, name))}


def accuracies(groups: Groups, n: int, ks: Iterable[int]) -> PerProblem:
    """`mean@n` and `pass@k`, the value at each problem; `score` instead if no sample has a verdict (`acc`).

    Args:
        n: `least_samples` of the groups.
        ks: for pass@k, each at most n.
    """
    if not n:
        return {"score": means(groups, "score")}
    verdicts = {key: found for key, group in groups.items() if (found := values(group, "acc"))}
    passes = {
        f"pass@{k}": {key: pass_at_k(len(found), found.count(1.0), k) for key, found in verdicts.items()} for k in ks
    }
    return {f"mean@{n}": means(groups, "acc")} | passes


def format_and_length(groups: Groups) -> PerProblem:
    """`format`, `truncated` and `response_tokens`, the mean at each problem."""
    return {name: means(groups, name) for name in ("format", "truncated", "response_tokens")}


def mean_candidates(groups: Groups) -> PerProblem:
    """`candidates`, the mean at each problem of Countdown."""
    some = {key: group[:COUNTED] for key, group in groups.items()}
    counts = {key: [count for row in group if (count := candidates(row)) is not None] for key, group in some.items()}
    return {"candidates": {key: fmean(found) for key, found in counts.items() if found}}


def summarize(samples: Iterable[Row]) -> dict[str, float]:
    """The means of an evaluation in distribution, without intervals, for a run's summary.json.

    Returns:
        `problems`; `mean@n`; `pass@k` for k = 1, 2, 4, ... and n; `format`, `truncated`, `response_tokens` and
        `candidates`. What no sample has is left out. Without any `acc`, `score` replaces `mean@n` and `pass@k`.
    """
    groups = in_distribution(by_problem(samples))
    n = least_samples(groups.values())
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    figures = accuracies(groups, n, ks) | format_and_length(groups) | mean_candidates(groups)
    return {"problems": len(groups)} | {name: fmean(each.values()) for name, each in figures.items() if each}


def what_is_missing(samples: Iterable[Row]) -> list[str]:
    """A sentence for each part of a verdict that this project's rewards give and these samples lack."""
    said = set().union(*(row.keys() for row in samples))
    meant = {
        "acc": "which responses are right, so there is no accuracy and no pass@k",
        "format": "which responses are well formed",
        "reason": "why a response is wrong",
    }
    return [f"no `{name}`: the reward does not say {what}" for name, what in meant.items() if said and name not in said]


def kinds(groups: Groups) -> list[dict[str, str]]:
    """For each problem its kinds, by name. The solver computes what the data does not record."""
    from data_prep.clean import fault  # imports pyarrow
    from data_prep.steps import ROW, annotations

    result, rows, asked = list[dict[str, str]](), [], []
    for group in groups.values():
        name, problem = set_name(group[0]), numbers_and_target(group[0])
        kind = {"set": name, "distribution": "out" if name.startswith(OUT) else "in"}
        result.append(kind)
        if problem is None:
            continue
        numbers, target = problem
        kind["numbers"] = str(len(numbers))
        if fault(numbers, target) is None:
            rows.append(np.zeros((), ROW))
            rows[-1]["count"], rows[-1]["target"] = len(numbers), target
            rows[-1]["numbers"][: len(numbers)] = numbers
            asked.append(kind)
    for kind, solved in zip(asked, annotations(np.array(rows, ROW)), strict=True):
        known = solved["solutions"] > 0
        decade = int(solved["difficulty"]) if known else 0
        kind["blind tries"] = f"10^{decade} to 10^{decade + 1}" if known else "no solution"
        kind["operators"] = ("+ and - do" if solved["additive"] else "* or / needed") if known else "no solution"
        kind["path"] = ("fraction needed" if solved["fraction"] else "integers do") if known else "no solution"
    return result


def as_figures(per_problem: PerProblem) -> dict[str, Figure]:
    """Each figure's mean over the problems that have it, with its interval."""
    return {name: figure(each.values(), share=name not in NO_SHARES) for name, each in per_problem.items() if each}


def restricted(per_problem: PerProblem, keys: Iterable[Key]) -> PerProblem:
    """Only the values of these problems."""
    chosen = set(keys)
    return {name: {key: each[key] for key in each if key in chosen} for name, each in per_problem.items()}


def by_kind(groups: Groups, per_problem: PerProblem) -> dict[str, dict[str, Any]]:
    """By kind and its value: the number of problems, and the figures over them."""
    members: dict[str, dict[str, list[Key]]] = defaultdict(lambda: defaultdict(list))
    for key, kind in zip(groups, kinds(groups), strict=True):
        for name, value in kind.items():
            members[name][value].append(key)
    return {
        name: {
            value: {"problems": len(keys), **as_figures(restricted(per_problem, keys))}
            for value, keys in sorted(of_kind.items())
        }
        for name, of_kind in members.items()
    }


def measure(samples: Iterable[Row], greedy: Iterable[Row] = ()) -> dict[str, Any]:
    """All figures of an evaluation.

    Args:
        samples: rows of samples/ (in_verl/sampler.py); `set` is a row's test set.
        greedy: the same, sampled at temperature 0.

    Returns:
        `n`, the least number of samples of a problem; `problems`; `figures`: name to [value, low, high], over the
        problems in distribution, or over all if there are none; `reasons`: the share of each reason, likewise;
        `tokens`: percentiles of response lengths; `by`: for each kind and value, `problems` and the main figures.

    Raises:
        UserError: there are no samples.
    """
    groups, greedy_groups = by_problem(samples), by_problem(greedy)
    if not groups:
        raise UserError("there are no samples to measure")
    n = least_samples(groups.values())
    zero = {"greedy": means(greedy_groups, "acc")}
    inside = in_distribution(groups)
    right = accuracies(inside, n, range(1, n + 1))
    if n:
        right[f"majority@{n}"] = {key: majority(group) for key, group in inside.items()}
    has_reasons = any("reason" in row for group in inside.values() for row in group)
    lengths = [length for group in inside.values() for length in values(group, "response_tokens")]
    return {
        "n": n,
        "problems": len(inside),
        "figures": as_figures(right | restricted(zero, inside) | format_and_length(inside) | mean_candidates(inside)),
        "reasons": {
            reason: figure(fmean(row.get("reason") == reason for row in group) for group in inside.values())
            for reason in (("right", *REASONS) if has_reasons else ())
        },
        "tokens": {str(p): float(np.percentile(lengths, p)) for p in (5, 50, 95)} if lengths else {},
        "by": by_kind(groups, accuracies(groups, n, {n}) | zero),
    }
