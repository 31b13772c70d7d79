"""Rewards as named weighted sums of components. `configs/reward/` has a file for each.

The published ones pay what those recipes paid, under this grammar: docs/reward.md lists every case in which a published
scorer's verdict is another. TinyZero is Jiayi-Pan/TinyZero, verl/utils/reward_score/countdown.py; mini-r1 and
Datawhale-R1 are the scripts that reward_score/components.py names.
"""

PROFILES: dict[str, dict[str, float]] = {
    "countdown": {"format": 0.1, "acc": 0.9},
    "tinyzero": {"answered": 0.1, "acc": 0.9},
    "mini_r1": {"layout": 1.0, "acc": 1.0},
    "datawhale_r1": {"layout": 1.0, "acc": 1.0},
    "datawhale_r1_article": {"layout": 1.0, "acc": 1.0, "thought_length": 1.0},  # withdrawn, see `thought_length`
    "television": {"distance": 1.0},  # with subset=True
}
