"""Synthetic problems: solvable by construction, with the test's number multisets held out of training.

    {"numbers": [11, 18, 25], "target": 175}

A multiset of numbers goes to the test split by a hash of itself, never by its place in the list, so neither another
size nor another order of generation can leak a test multiset into training. The target is uniform over the values that
the numbers reach with integer intermediates from 0 to `max_target`, so a child could follow every solution.
"""

import hashlib
import random
from collections.abc import Sequence
from functools import cache
from typing import TypedDict

from data_prep.solver import expressions


class Problem(TypedDict):
    numbers: list[int]
    target: int


def is_held_out(numbers: Sequence[int], share: float) -> bool:
    """Whether this multiset of numbers belongs to the test split; `share` of all multisets do."""
    digest = hashlib.sha256(",".join(map(str, sorted(numbers))).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@cache
def reachable_targets(numbers: tuple[int, ...], max_target: int) -> tuple[int, ...]:
    """All targets in 1..max_target that `numbers` reach with integer intermediates in 0..max_target, ascending."""
    values = {int(value) for value, _ in expressions(numbers, range(max_target + 1))}
    return tuple(sorted(values - {0}))


def generate(
    size: int, *, test: bool, seed: int, count: int, max_number: int, max_target: int, held_out_share: float
) -> list[Problem]:
    """`size` distinct problems of one split.

    Args:
        size: how many problems.
        test: the held-out split, else the training split.
        seed: the same seed gives the same problems on every machine.
        count: how many numbers a problem has.
        max_number: numbers are uniform in 1..max_number.
        max_target: targets lie in 1..max_target.
        held_out_share: share of number multisets that belong to the test split.

    Raises:
        ValueError: there are not that many distinct problems.
    """
    rng = random.Random(f"{seed}-{'test' if test else 'train'}")
    problems: dict[tuple[tuple[int, ...], int], Problem] = {}
    for _ in range(1000 + 100 * size):
        if len(problems) == size:
            break
        numbers = [rng.randint(1, max_number) for _ in range(count)]
        targets = reachable_targets(tuple(sorted(numbers)), max_target)
        if targets and is_held_out(numbers, held_out_share) == test:
            target = rng.choice(targets)
            problems.setdefault((tuple(sorted(numbers)), target), {"numbers": numbers, "target": target})
    if len(problems) < size:
        raise ValueError(
            f"only {len(problems)} distinct {'test' if test else 'training'} problems were found with {count} numbers "
            f"up to {max_number}, but {size} were asked for; lower the size or raise max_number"
        )
    return list(problems.values())
