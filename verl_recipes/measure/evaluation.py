"""What an evaluation says, each figure with its 95% confidence interval over problems; and two evaluations compared.

The unit is the problem: the n samples of one depend on each other, problems do not. So every figure is the mean over
problems of one value a problem, and its interval tells what other problems of the same kind could have given.

**Intervals.** Of shares (accuracy, pass@k, truncation) a Wilson score interval with the effective sample size
m (1 - m) / (s² / P), for P problems with mean m and variance s², and Student's quantile: Korn and Graubard, Survey
Methodology 24 (1998) 193-201, with Wilson's interval in place of Clopper and Pearson's. Unlike the bootstrap and the
t interval it stays right near 0 and 1, where pass@k lives. With fewer than FEW problems away from 0, or from 1, the
variance is not to be trusted, and the effective size is P. Of lengths and counts, Student's t interval. Tests simulate
the coverage.

**Comparison.** The problems are the same, so the test is paired: under the null hypothesis that both models are equally
good on each problem, the sign of each difference is a coin. scipy's permutation test flips them, and assumes nothing of
the distribution. Wilcoxon's test would drop the many problems with no difference and rank the many ties.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from data_prep.cli import UserError
from data_prep.steps import ROW, annotations
from reward_score.grammar import MAX_EXPRESSION, REASONS, find_answer
from verl_recipes.measure.summary import candidates_tried, pass_at_k

Row = Mapping[str, Any]
Array = NDArray[Any]
Figure = list[float]  # value, low end, high end

CONFIDENCE = 0.95
FEW = 10
RESAMPLES = 9999
OUT = "ood_"  # how the names of test sets out of distribution begin (data_prep)


def t_interval(values: Array) -> tuple[float, float]:
    """Student's t interval of a mean."""
    if len(values) < 2:
        return -np.inf, np.inf
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    return values.mean() - half, values.mean() + half


def share_interval(values: Array) -> tuple[float, float]:
    """Interval of the mean of values in 0..1, shape (problems,); see the top."""
    size, mean, variance = len(values), values.mean(), values.var(ddof=1) if len(values) > 1 else 0.0
    if size < 2:
        return 0.0, 1.0
    if variance > 0 and min((values != 0).sum(), (values != 1).sum()) >= FEW:
        size = mean * (1 - mean) / (variance / size)
    q = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) ** 2 / size
    half = np.sqrt(q * mean * (1 - mean) + q * q / 4)
    return max(0.0, (mean + q / 2 - half) / (1 + q)), min(1.0, (mean + q / 2 + half) / (1 + q))


def figure(values: Iterable[float], *, share: bool = True) -> Figure:
    """Mean over problems, with its interval."""
    array = np.fromiter(values, float)
    low, high = share_interval(array) if share else t_interval(array)
    return [float(array.mean()), float(low), float(high)]


def problem_key(row: Row) -> tuple[Any, ...]:
    """The same for two rows on the same problem, of whatever model, prompt and evaluation."""
    truth = row["ground_truth"]
    index = row.get("extra_info", {}).get("index")
    return *sorted(truth["numbers"]), "=", truth["target"], row.get("set", "test"), index


def by_problem(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows grouped by problem, in the order of their first."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[problem_key(row)].append(row)
    return dict(groups)


def majority(rows: Sequence[Row]) -> float:
    """Chance that the answer given most often is right; ties are broken by a fair draw, no answer has no vote.

    An answer is the equation without white space. The usual vote is on a value; here that would be the target, which
    every voter knows.

    >>> rows = [{"response": f"</think><answer>{text}</answer>", "acc": text == "1+2"} for text in ("1+2", "2-1")]
    >>> majority(rows), majority([*rows, {"response": "</think><answer>1 + 2</answer>", "acc": 1.0}])
    (0.5, 1.0)
    """
    votes, right = Counter[str](), {}
    for row in rows:
        found = find_answer(row["response"])[1]
        if found is not None and found[1] - found[0] <= MAX_EXPRESSION:
            answer = "".join(row["response"][slice(*found)].split())
            votes[answer] += 1
            right[answer] = float(row["acc"])
    most = [answer for answer, count in votes.items() if count == max(votes.values())]
    return float(np.mean([right[answer] for answer in most])) if most else 0.0


def kinds(groups: Mapping[tuple[Any, ...], list[Row]]) -> list[dict[str, str]]:
    """Of each problem, what kinds it belongs to: a name and a value each. The solver says what the data does not."""
    problems = [group[0]["ground_truth"] for group in groups.values()]
    rows = np.zeros(len(problems), ROW)
    for row, truth in zip(rows, problems, strict=True):
        row["count"], row["target"] = len(truth["numbers"]), truth["target"]
        row["numbers"][: len(truth["numbers"])] = truth["numbers"]
    result = []
    for group, row, solved in zip(groups.values(), rows, annotations(rows), strict=True):
        name, known = str(group[0].get("set", "test")), solved["solutions"] > 0
        decade = int(solved["difficulty"]) if known else 0
        result.append(
            {
                "set": name,
                "distribution": "out" if name.startswith(OUT) else "in",
                "numbers": str(row["count"]),
                "blind tries": f"10^{decade} to 10^{decade + 1}" if known else "no solution",
                "operators": ("+ and - do" if solved["additive"] else "* or / needed") if known else "no solution",
                "path": ("fraction needed" if solved["fraction"] else "integers do") if known else "no solution",
            }
        )
    return result


def accuracies(groups: Sequence[Sequence[Row]], greedy: Sequence[Sequence[Row]]) -> dict[str, Figure]:
    """mean@n, pass@k for every k up to n, majority@n, and greedy where there are greedy responses.

    Args:
        groups: of each problem the samples, equally many.
        greedy: of each problem the greedy response, or nothing.
    """
    n = len(groups[0])
    right = [round(sum(row["acc"] for row in group)) for group in groups]
    figures = {f"mean@{n}": figure(count / n for count in right)}
    for k in range(1, n + 1):
        chance = [pass_at_k(n, count, k) for count in range(n + 1)]
        figures[f"pass@{k}"] = figure(chance[count] for count in right)
    figures[f"majority@{n}"] = figure(map(majority, groups))
    return figures | ({"greedy": figure(rows[0]["acc"] for rows in greedy)} if any(greedy) else {})


def mean_of(groups: Iterable[Sequence[Row]], value: Callable[[Row], float], *, share: bool = True) -> Figure:
    """Mean over problems of the mean over a problem's samples."""
    return figure((float(np.mean([value(row) for row in group])) for group in groups), share=share)


def _refused(reason: str, row: Row) -> bool:
    return bool(row["reason"] == reason)


def measure(samples: Iterable[Row], greedy: Iterable[Row] = ()) -> dict[str, Any]:
    """All figures of an evaluation.

    Args:
        samples: rows of samples/ (in_verl/sampler.py), n for every problem; `set` tells of a row's test set.
        greedy: the same with one row a problem, sampled at temperature 0.

    Returns:
        `n`; `problems`; `figures`: name to [value, low, high], over the problems in distribution where there are such,
        else over all; `reasons`: the share of each reason, likewise; `tokens`: percentiles of response lengths; and
        `by`: kind, value, and there `problems` and the main figures. A reward that says neither `format` nor `reason`
        leaves those out.

    Raises:
        UserError: there are no samples, or problems with more samples than others have.
    """
    groups, at_zero = by_problem(samples), by_problem(greedy)
    sizes = Counter(map(len, groups.values()))
    if len(sizes) != 1:
        raise UserError(f"not every problem has the same number of samples: {dict(sizes) or 'there are none'}")
    n, kind_of = next(iter(sizes)), kinds(groups)
    pairs = [(group, at_zero.get(key, [])) for key, group in groups.items()]
    within = [pair for pair, kind in zip(pairs, kind_of, strict=True) if kind["distribution"] == "in"] or pairs
    inside = [group for group, _ in within]
    lengths = [row["response_tokens"] for group in inside for row in group]
    by: dict[str, dict[str, Any]] = defaultdict(dict)
    for name in kind_of[0]:
        for value in sorted({kind[name] for kind in kind_of}):
            some = [pair for pair, kind in zip(pairs, kind_of, strict=True) if kind[name] == value]
            figures = accuracies([group for group, _ in some], [zero for _, zero in some])
            main = {key: figures[key] for key in (f"mean@{n}", f"pass@{n}", "greedy") if key in figures}
            by[name][value] = {"problems": len(some), **main}
    return {
        "n": n,
        "problems": len(inside),
        "figures": accuracies(inside, [zero for _, zero in within])
        | ({"format": mean_of(inside, lambda row: row["format"])} if "format" in inside[0][0] else {})
        | {
            "truncated": mean_of(inside, lambda row: row["truncated"]),
            "response_tokens": mean_of(inside, lambda row: row["response_tokens"], share=False),
            "candidates": mean_of(inside, candidates_tried, share=False),
        },
        "reasons": {
            reason: mean_of(inside, partial(_refused, reason))
            for reason in ("right", *REASONS)
            if "reason" in inside[0][0]
        },
        "tokens": {str(p): float(np.percentile(lengths, p)) for p in (5, 50, 95)},
        "by": dict(by),
    }


def compare(first: Iterable[Row], second: Iterable[Row]) -> dict[str, Any]:
    """Paired test of two evaluations on the same problems.

    Args:
        first, second: samples, any number for a problem; compared are the shares that are right.

    Returns:
        `problems`; `first`, `second`, `difference` (second less first): each [value, low, high]; `better` and `worse`:
        how many problems the second does better or worse at; `p`: of the two-sided sign-flip permutation test.

    Raises:
        UserError: the problems are not the same.
    """
    means = [
        {key: float(np.mean([row["acc"] for row in group])) for key, group in by_problem(rows).items()}
        for rows in (first, second)
    ]
    if means[0].keys() != means[1].keys():
        common = len(means[0].keys() & means[1].keys())
        raise UserError(
            f"the two were not measured on the same problems: {len(means[0])} and {len(means[1])}, {common} in common"
        )
    a, b = (np.array([each[key] for key in means[0]]) for each in means)
    test = stats.permutation_test(  # of one sample alone, "samples" flips signs
        (b - a,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, batch=1 + 10**6 // len(a), rng=0
    )
    return {
        "problems": len(a),
        "first": figure(a),
        "second": figure(b),
        "difference": figure(b - a, share=False),
        "better": int((b > a).sum()),
        "worse": int((b < a).sum()),
        "p": float(test.pvalue),
    }
