"""Which samples belong to one problem, and what is read from each.

A sample is a row of samples/ (in_verl/sampler.py). The key of a Countdown problem is its multiset of numbers, its
target and its test set. The key is defined here and nowhere else:

- The order of the numbers and the prompt are not part of it: recipes word the same problem differently.
- The index is not part of it, as it only says where a row is in its file. A problem that a file holds twice is one
  problem with twice the samples. Two problems would not be independent of each other, and every interval and test here
  assumes that problems are.
- The test set is part of it, as the same problem may occur in two sets and each set has its own figures. An evaluation
  names it (`set`); in a run, `data_source` distinguishes the sets, as in verl's metrics, and `extra_info.split` says
  which are out of distribution.

Rows of another task have no numbers and target. The key of their problem is the prompt.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from reward_score.grammar import find_answer

Row = Mapping[str, Any]
Key = tuple[Any, ...]
OUT = "ood_"  # the names of test sets out of distribution begin with it (data_prep)


def finite(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer of more than 300 digits
        return None


def numbers_and_target(row: Row) -> tuple[list[int], int] | None:
    """The problem of a row as it was posed; None if it is not Countdown's."""
    truth = row.get("ground_truth")
    if not isinstance(truth, dict) or not isinstance(truth.get("target"), int):
        return None
    numbers = truth.get("numbers")
    if not isinstance(numbers, list) or not numbers or not all(isinstance(each, int) for each in numbers):
        return None
    return numbers, truth["target"]


def set_name(row: Row) -> str:
    """The name of a row's test set. In a run that is "test", or the name of a set out of distribution."""
    info = row.get("extra_info")
    split = str(info.get("split")) if isinstance(info, dict) else ""
    return str(row.get("set") or (split if split.startswith(OUT) else "test"))


def problem_key(row: Row) -> Key:
    """Equal for two rows of the same problem, whatever model, prompt and evaluation they come from."""
    problem, source = numbers_and_target(row), str(row.get("data_source", ""))
    if problem is None:
        return set_name(row), source, str(row.get("prompt", ""))
    numbers, target = problem
    return set_name(row), source, *sorted(numbers), "=", target


def by_problem(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Rows grouped by problem, in the order of each problem's first row."""
    groups: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        groups[problem_key(row)].append(row)
    return dict(groups)


def in_distribution(groups: Mapping[Key, list[Row]]) -> dict[Key, list[Row]]:
    """The problems of the sets that are not out of distribution; all of them if there are no others."""
    return {key: group for key, group in groups.items() if not set_name(group[0]).startswith(OUT)} or dict(groups)


def values(group: Iterable[Row], name: str) -> list[float]:
    """The finite numbers that the samples of a problem have under this name."""
    return [value for row in group if (value := finite(row.get(name))) is not None]


def answer_of(row: Row) -> tuple[int | None, tuple[int, int] | None]:
    """`find_answer` of a response, also in its thought if the reward took an answer from there (profile tinyzero)."""
    thought_end, answer = find_answer(row["response"])
    if answer is None and row.get("reason", "no_answer") != "no_answer":
        return find_answer(row["response"], answer_in_thought=True)
    return thought_end, answer


def least_samples(groups: Iterable[Iterable[Row]]) -> int:
    """The least number of samples with a verdict (`acc`), over the problems that have any; 0 if none has.

    It is the n of mean@n and the largest k of pass@k. For a larger k, some problems would have no unbiased estimate.
    """
    return min(filter(None, (len(values(group, "acc")) for group in groups)), default=0)
