"""A control: the reward is a coin that ignores the response, while `acc` and `format` still tell the truth.

A policy that improves under it improves for another reason than the reward (its data, its own entropy, a leak). Rewards
of this kind did improve some models (arXiv 2506.10947, "Spurious Rewards"), so the comparison is worth its minutes.
"""

import random
from collections.abc import Mapping
from typing import Any

from reward_score import countdown


def compute_score(
    data_source: str, solution_str: str, ground_truth: Mapping[str, Any], extra_info: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """As `countdown.compute_score`, with `score` 0.0 or 1.0 by a fair coin."""
    verdict = countdown.compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)
    return verdict | {"score": float(random.random() < 0.5)}
