"""Which problem comes next, by difficulty: from easy to hard, balanced, or where about half of the answers are right.

The problems are cut into classes by `extra_info.difficulty`, which `python -m data_prep annotate=true` writes: the
logarithm of the tries of a blind search. The order of a run is drawn from its seed. All that
it depends on is in `state`, so a run that goes on continues it, with no problem lost or repeated.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from verl_recipes.measure.difficulty import CLASSES, edges_of

WIDTH = 0.75  # of the normal distribution over the classes that easy_to_hard moves along, in classes
MEMORY = 0.9  # share of what is known about a class that adaptive keeps from step to step
LEAST = 0.02  # added to the weight of every class in adaptive, so that each is tried again (the largest weight is 0.25)


@lru_cache(maxsize=2 * CLASSES)
def shuffled(seed: int, place: int, turn: int, size: int) -> Any:
    """The order of a class in one pass through it, which as many draws as it has problems look up."""
    return np.random.default_rng([seed, place, turn]).permutation(size)


class Curriculum:
    """The order of one run's problems.

    Args:
        difficulty: of each problem, in the order of the data.
        order: easy_to_hard, balanced or adaptive.
        draws: how many problems the whole run takes, the length of `easy_to_hard`.
    """

    def __init__(self, difficulty: Sequence[float], order: str, seed: int, draws: int) -> None:
        self.order, self.seed, self.draws = order, seed, draws
        self.edges = edges_of(difficulty)
        classes = self.class_of(difficulty)
        self.members = [np.flatnonzero(classes == place) for place in range(len(self.edges) + 1)]
        self.drawn, self.taken = 0, [0] * len(self.members)
        self.right, self.tried = [0.0] * len(self.members), [0.0] * len(self.members)

    def class_of(self, difficulty: float | Sequence[float]) -> Any:
        return np.searchsorted(self.edges, difficulty, side="left")

    def weights(self) -> np.ndarray:
        """How often each class is drawn now; they sum to 1.

        easy_to_hard follows the Gaussian schedule of E2H (arXiv 2506.06632): a normal distribution over the
        classes whose mean moves from the first to the last. adaptive weighs a class by p (1 - p), the variance of its
        success, which is also the mean square of a group's advantages before they are normalised (arXiv 2502.12272
        draws problems so); p is a running mean after a uniform prior.
        """
        places = np.arange(len(self.members))
        if self.order == "easy_to_hard":
            mean = min(self.drawn / self.draws, 1.0) * (len(places) - 1)
            raw = np.exp(-(((places - mean) / WIDTH) ** 2) / 2)
        elif self.order == "adaptive":
            p = (np.array(self.right) + 1) / (np.array(self.tried) + 2)
            raw = p * (1 - p) + LEAST
        else:
            raw = np.ones(len(places))
        return raw / raw.sum()

    def next(self) -> int:
        """The number of the next problem. Within a class each comes once before any comes again."""
        if self.order == "balanced":
            place = self.drawn % len(self.members)
        else:
            place = int(np.random.default_rng([self.seed, self.drawn]).choice(len(self.members), p=self.weights()))
        members = self.members[place]
        turn, at = divmod(self.taken[place], len(members))
        self.drawn += 1
        self.taken[place] += 1
        return int(members[shuffled(self.seed, place, turn, len(members))[at]])

    def learn(self, results: Iterable[tuple[float, float]]) -> None:
        """Take note of a step's responses: the difficulty of each one's problem, and 1 if it was right, else 0."""
        self.right = [MEMORY * value for value in self.right]
        self.tried = [MEMORY * value for value in self.tried]
        for difficulty, right in results:
            place = int(self.class_of(difficulty))
            self.right[place] += right
            self.tried[place] += 1

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "taken": [*self.taken], "right": [*self.right], "tried": [*self.tried]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.drawn, self.taken = state["drawn"], [*state["taken"]]
        self.right, self.tried = [*state["right"]], [*state["tried"]]
