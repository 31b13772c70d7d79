"""The two steps of the preparation, as functions of a few rows that any process on any machine can run.

`first_step` cleans a batch of the source and computes, for each row, its side and its place in the order of that side.
The order is cut into ranges of equal width, so that one range of all batches fits in memory. `second_step` sorts a
range, drops duplicates and solves the rest.
"""

from typing import Any, NamedTuple

import numpy as np

from data_prep.clean import Batch, Problems, clean
from data_prep.generate import distinct, generate
from data_prep.solver import MAX_COUNT, Array, forms, solve_many
from data_prep.split import NEITHER, TEST, Split, assign, hash_numbers, mix

ROW = np.dtype(
    [
        ("key", "u8"),  # order within the side
        ("hash", "u8"),  # of the numbers
        ("place", "i8"),  # in the source
        ("target", "i4"),
        ("numbers", "u2", (MAX_COUNT,)),  # in the source's order, 0 if unused
        ("count", "u1"),
        ("side", "u1"),
    ]
)
SOLVED = np.dtype([("solutions", "i4"), ("additive", "?"), ("fraction", "?"), ("difficulty", "f8")])
# About how many rows a range holds. The result does not depend on it.
RANGE = 65_536


class Task(NamedTuple):
    """What both steps need besides the rows."""

    split: Split
    columns: tuple[str, str]
    bits: int  # the order of a side is cut into 2**bits ranges
    deduplicate: bool
    annotate: bool


def as_rows(split: Split, problems: Problems) -> Array:
    """Problems as ROW records."""
    rows = np.zeros(len(problems.place), ROW)
    used = np.arange(MAX_COUNT) < problems.count[:, None]
    ascending = np.sort(np.where(used, problems.numbers, np.iinfo(np.int64).max), axis=1)
    rows["hash"] = hash_numbers(ascending, problems.count)
    rows["numbers"], rows["count"], rows["target"], rows["place"] = (
        problems.numbers, problems.count, problems.target, problems.place,
    )  # fmt: skip
    rows["side"], rows["key"] = assign(split, rows["hash"], problems.target, problems.place)
    return rows


def first_step(batch: Batch, task: Task) -> tuple[Array, list[dict[str, Any]]]:
    """The rows of a batch that belong to a side, in the order of their ranges; and the rejected rows."""
    if batch.kind == "synthetic":
        preset, seed, start, stop = batch.data
        numbers, count, target = generate(preset, np.arange(start, stop), seed)
        problems, rejected = Problems(numbers, count, target, np.arange(start, stop)), list[dict[str, Any]]()
    else:
        problems, rejected = clean(batch, task.columns)
    rows = as_rows(task.split, problems)
    rows = rows[rows["side"] != NEITHER]
    return rows[np.argsort(rows["side"].astype(np.uint64) << np.uint64(63) | rows["key"] >> np.uint64(1))], rejected


def range_of(rows: Array, task: Task) -> Array:
    """The range of each row, 0 .. 2 * 2**task.bits - 1; those of the test side come first."""
    within = rows["key"] >> np.uint64(1) >> np.uint64(63 - task.bits)
    return (rows["side"].astype(np.int64) << task.bits) + within.astype(np.int64)


def problem_hash(rows: Array) -> Array:
    """A hash of numbers and target, which is the same for equal problems."""
    return mix(rows["hash"] ^ mix(rows["target"].astype(np.uint64)))


def second_step(rows: Array, task: Task, annotate: bool) -> tuple[Array, Array]:
    """Sort the rows of one range and drop duplicates; returns the kept rows and their annotations.

    The first of equal problems in the source is kept. Without `annotate` nothing is solved and `solutions` is -1.
    """
    rows = rows[np.lexsort((rows["place"], rows["key"]))]
    if task.deduplicate and len(rows):
        # Equal problems have equal keys. Different ones may too, by a chance of one in 2**64, so they are compared.
        of_problem = rows[["key", "hash", "target"]]
        rows = rows[np.append(True, of_problem[1:] != of_problem[:-1])]
    return rows, annotations(rows) if annotate else unsolved(len(rows))


def unsolved(size: int) -> Array:
    """Annotations of rows that were not solved."""
    result = np.zeros(size, SOLVED)
    result["solutions"], result["difficulty"] = -1, np.nan
    return result


def annotations(rows: Array) -> Array:
    """The solver's results for each row.

    `difficulty` is log10 of the number of expressions on that many numbers (6, 68, 1170, 27142 or 793002) for each one
    that solves the problem: the number of blind tries for a solution, in powers of ten; too many if numbers repeat,
    as there are then fewer functions. NaN without a solution.
    """
    result = unsolved(len(rows))
    for n in np.unique(rows["count"]).tolist():
        here = np.flatnonzero(rows["count"] == n)
        solved = solve_many(rows["numbers"][here, :n].astype(np.int64), rows["target"][here].astype(np.int64))
        result["solutions"][here] = solved.solutions
        result["additive"][here], result["fraction"][here] = solved.additive, solved.fraction
        with np.errstate(divide="ignore"):
            difficulty = np.log10(len(forms(n).value) / solved.solutions)
        result["difficulty"][here] = np.where(solved.solutions > 0, difficulty, np.nan)
    return result


def ood_rows(preset: dict[str, Any], size: int, seed: int, task: Task, held_out_share: float) -> tuple[Array, Array]:
    """A test set out of distribution: rows of a preset with numbers of the test side, and their annotations."""
    problems = Problems(*distinct(preset, size, seed, side=TEST, held_out_share=held_out_share), np.arange(size))
    rows = as_rows(task.split, problems)
    return rows, annotations(rows)
