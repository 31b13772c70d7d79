"""Rewards as named weighted sums of components, with the grammar's options that they need.

`configs/reward/` has a file for each. The published ones pay what those recipes paid, under this grammar:
docs/reward.md lists every case in which a published scorer decides otherwise. TinyZero is Jiayi-Pan/TinyZero at commit
b19c457, verl/utils/reward_score/countdown.py; mini-r1 and Datawhale-R1 are the scripts that
reward_score/components.py names.
"""

from typing import NamedTuple


class Profile(NamedTuple):
    """`weights` of components, and the names of the grammar's `options` that are on unless a keyword says otherwise."""

    weights: dict[str, float]
    options: frozenset[str] = frozenset()


PROFILES = {
    "countdown": Profile({"format": 0.1, "acc": 0.9}),
    "closeness": Profile({"format": 0.1, "closeness": 0.4, "acc": 0.5}),
    "tinyzero": Profile({"answered": 0.1, "acc": 0.9}, frozenset({"answer_in_thought"})),
    "mini_r1": Profile({"layout": 1.0, "acc": 1.0}),
    "datawhale_r1": Profile({"layout": 1.0, "acc": 1.0}),
    "datawhale_r1_article": Profile({"layout": 1.0, "acc": 1.0, "thought_length": 1.0}),  # withdrawn by its authors
    "television": Profile({"distance": 1.0}, frozenset({"subset"})),
}
