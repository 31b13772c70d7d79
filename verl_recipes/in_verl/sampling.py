"""How much of the probability training's sampling keeps, for the guard of agreement.py.

verl gives a training engine nothing of the rollout's configuration. What sends weights lives in the same process and
gets it: weight_socket.py, and with `topology=split` cpu/weight_transfer.py. So it holds for verl's stock command too.
With `topology=split` on GPUs verl's own code sends, and a run's environment tells it (run/start.py).
"""

import os

from verl_recipes.settings.configuration import KEPT, kept_of

_kept: float | None = None


def note(top_p: float, top_k: int) -> None:
    """Remember verl's `rollout.top_p` and `rollout.top_k` (-1 for all) for this process."""
    global _kept
    _kept = kept_of(top_p, top_k)


def kept_share() -> float:
    """The share of the probability that sampling keeps at least; 0 if that is not known, as with top_k."""
    return float(os.environ.get(KEPT, "0")) if _kept is None else _kept
