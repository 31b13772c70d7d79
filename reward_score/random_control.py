"""A control: the reward is a coin that ignores whether a response is right; `acc` and `format` still tell the truth.

A policy that improves under it improves for another reason than the reward (its data, its own entropy, a leak). Rewards
of this kind did improve some models (arXiv 2506.10947, "Spurious Rewards"), so the comparison is worth its minutes.

The coin is a hash of the seed, the row, the response, and of how often this process has seen that response to that row
before. So a run can be repeated, whatever the order in which threads score; coins of different responses are
independent; and equal responses in one group get coins of their own, as verl calls the function once for each. verl
does not say which draw of a group it passes, hence the count; and it deals responses to its reward workers at random,
so that only one worker counts all of them: configs/reward/random.yaml asks for one.
"""

import threading
from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from reward_score import countdown

_seen: Counter[bytes] = Counter()
_lock = threading.Lock()  # verl's reward worker scores in several threads


def check_options(*, seed: int = 0, **options: Any) -> countdown.Options:
    """As `countdown.check_options`, with the coin's seed."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed is an integer, not {seed!r}")
    return countdown.check_options(**options)


def coin(seed: int, row: str, response: str, before: int) -> float:
    """0.0 or 1.0, a fair coin for the response to a row that was scored so many times before.

    >>> [coin(0, "train 7", "no", before) for before in range(8)]
    [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    """
    text = "\0".join((str(seed), row, str(before), response))
    return float(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()[0] & 1)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Mapping[str, Any],
    extra_info: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """As `countdown.compute_score`, with `score` 0.0 or 1.0 by a coin."""
    check_options(seed=seed)
    verdict = countdown.compute_score(data_source, solution_str, ground_truth, extra_info, **options)
    row = " ".join(str((extra_info or {}).get(key)) for key in ("split", "index"))
    key = blake2b(f"{row}\0{solution_str}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    with _lock:
        before = _seen[key]
        _seen[key] += 1
    return verdict | {"score": coin(seed, row, solution_str, before)}
