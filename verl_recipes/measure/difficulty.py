"""Classes of problems by difficulty, which a curriculum draws from (configs/curriculum/)."""

from collections.abc import Sequence

import numpy as np

CLASSES = 5  # of about equal size, if no difficulty is shared by so many problems
LEAST_SIZE = 0.25  # of a class beside a difficulty that fills one by itself, in equal shares


def edges_of(difficulty: Sequence[float]) -> list[float]:
    """The greatest difficulty of each class but the last.

    A difficulty that fills a class by itself does not swallow the easier problems: nine of ten problems of the tiny
    task share the greatest.

    >>> edges_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    [2.0, 4.0, 6.0, 8.0]
    >>> edges_of([1, 2, *[3] * 18])
    [2.0]
    """
    values, counts = np.unique(difficulty, return_counts=True)
    share = len(difficulty) / CLASSES
    edges, inside = [], 0
    for value, count, following in zip(values, counts, counts[1:], strict=False):
        inside += count
        if inside >= share or (following >= share and inside >= LEAST_SIZE * share):
            edges.append(float(value))
            inside = 0
    return edges
