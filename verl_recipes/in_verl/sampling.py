"""How much of the probability training's sampling keeps, for the guard of agreement.py.

verl gives a training engine nothing of the rollout's configuration. What sends weights lives in the same process and
gets it: weight_socket.py, and with `topology=split` cpu/weight_transfer.py. So it holds for verl's stock command too.
With `topology=split` on GPUs, where verl's own code sends, it stays unknown.
"""

_kept = 0.0


def note(top_p: float, top_k: int) -> None:
    """Remember verl's `rollout.top_p` and `rollout.top_k` (-1 for all) for this process."""
    global _kept
    _kept = 0.0 if top_k > 0 else float(top_p)


def kept_share() -> float:
    """The share of the probability that sampling keeps at least; 0 if that is not known, as with top_k."""
    return _kept
