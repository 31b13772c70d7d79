"""What the samples of an evaluation say: mean@n, pass@k, lengths, candidates tried."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import comb
from statistics import fmean
from typing import Any

from verl_recipes.measure.behaviours import behaviours

# The metric of rollout and actor: verl's, and where the update itself measures it (verl_recipes/cpu/engine.py).
AGREEMENT = ["training/rollout_actor_probs_pearson_corr", "actor/rollout_actor_probs_pearson_corr"]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, from n samples of which some are.

    1 - C(n - correct, k) / C(n, k): equation 1 of arXiv 2107.03374 (Codex).

    >>> pass_at_k(8, 1, 1)
    0.125
    """
    return 1.0 - comb(n - correct, k) / comb(n, k)


def candidates_tried(sample: Mapping[str, Any]) -> float:
    """How many candidates a sample's response tries (verl_recipes/measure/behaviours.py says what counts as one)."""
    problem = sample["ground_truth"]
    return behaviours(sample["response"], problem["numbers"], problem["target"])["candidates"]


def summarize(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Figures over an evaluation with the same number n of samples for every problem, known by its prompt.

    Returns:
        `problems`, `mean@n`, `pass@1`, `pass@2`, ... up to `pass@n` by doubling, `format`, `response_tokens`,
        `candidates` and `truncated`, each but the first a mean over samples or problems; no `format` if the reward
        says none.
    """
    correct: dict[str, list[float]] = defaultdict(list)
    for row in samples:
        correct[row["prompt"]].append(row["acc"])
    n = len(next(iter(correct.values())))
    result: dict[str, float] = {"problems": len(correct), f"mean@{n}": fmean(row["acc"] for row in samples)}
    for k in sorted({n} | {2**i for i in range(n.bit_length()) if 2**i <= n}):
        result[f"pass@{k}"] = fmean(pass_at_k(len(group), round(sum(group)), k) for group in correct.values())
    for name in ("format", "response_tokens", "truncated"):
        if name in samples[0]:
            result[name] = fmean(row[name] for row in samples)
    return result | {"candidates": fmean(map(candidates_tried, samples))}
