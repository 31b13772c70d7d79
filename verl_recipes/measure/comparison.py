"""Two evaluations compared on the same problems.

The test is paired. If both models were equally good at each problem (the null hypothesis), the sign of each problem's
difference would be a coin. scipy's permutation test flips the signs and assumes nothing about the distribution.
Wilcoxon's test would drop the many problems without a difference, and rank the many ties.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from data_prep.cli import UserError
from reward_score.figures import FEW
from verl_recipes.measure.intervals import Figure, figure
from verl_recipes.measure.problems import Row, by_problem, values

RESAMPLES = 9999


def compare(first: Iterable[Row], second: Iterable[Row]) -> dict[str, Any]:
    """Paired test of two evaluations on the same problems.

    Args:
        first, second: samples, any number for each problem; the shares of right samples are compared.

    Returns:
        `problems`; `first`, `second`, `difference` (second less first): each [value, low, high]; `better` and `worse`:
        how many problems the second does better or worse at; `p`: of the two-sided sign-flip permutation test.

    Raises:
        UserError: the problems differ, or samples have no verdict.
    """
    means = []
    for rows in (first, second):
        verdicts = {key: values(group, "acc") for key, group in by_problem(rows).items()}
        if not all(verdicts.values()):
            raise UserError("samples without `acc` cannot be compared: their reward does not say which are right")
        means.append({key: fmean(each) for key, each in verdicts.items()})
    if means[0].keys() != means[1].keys() or not means[0]:
        common = len(means[0].keys() & means[1].keys())
        raise UserError(
            f"the two were not measured on the same problems: {len(means[0])} and {len(means[1])}, {common} in common"
        )
    a, b = (np.array([each[key] for key in means[0]]) for each in means)
    return {
        "problems": len(a),
        "first": figure(a),
        "second": figure(b),
        "difference": difference_of(b - a),
        "better": int((b > a).sum()),
        "worse": int((b < a).sum()),
        "p": sign_flip_p(b - a),
    }


def difference_of(differences: Sequence[float] | np.ndarray[Any, Any]) -> Figure:
    """The mean of differences, shape (problems,), with Student's interval.

    If fewer than FEW problems differ, the interval counts two more, one each way, as Student's own is too narrow then,
    and has no width if none differs (the idea of Agresti and Min, Statistics in Medicine 24, 2005).
    """
    mean, *ends = figure(differences, share=False)
    if np.count_nonzero(differences) < FEW:
        _, *ends = figure([*differences, 1.0, -1.0], share=False)
    return [mean, *ends]


def sign_flip_p(differences: np.ndarray[Any, Any]) -> float:
    """p of the two-sided permutation test of differences, shape (problems,): exact for few, else by RESAMPLES draws."""
    from scipy import stats  # slow to import

    if (size := len(differences)) < 2:
        return 1.0  # both signs are equally extreme; scipy refuses
    test = stats.permutation_test(  # of one sample alone, "samples" flips signs
        (differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, batch=1 + 10**6 // size, rng=0
    )
    return float(test.pvalue)
