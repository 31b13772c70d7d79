"""Synthetic problems, solvable by construction.

    {"numbers": [11, 18, 25], "target": 175}

Numbers are drawn first. Then the target is drawn uniformly from those in its range that the numbers reach, which the
solver lists. Problem i depends only on the seed and i: its random numbers are hashes (data_prep/split.py, `mix`) and
not a stream, so any number of workers on any machine makes the same problems.
"""

import itertools
from functools import lru_cache
from typing import Any

import numpy as np

from data_prep.cli import UserError
from data_prep.solver import MAX_COUNT, SYMBOLS, Array, reachable
from data_prep.split import TEST, hash_numbers, is_held_out, mix

LARGE, SMALL = np.array([25, 50, 75, 100]), np.repeat(np.arange(1, 11), 2)  # the tiles of the television game
LEAST = 32  # `distinct` makes at least this many problems at once
CELLS = 1 << 24  # problems times targets that are looked at at once: 16 MB, and 16 bytes for each that is reached
ATTEMPTS = 20_000  # draws for one problem until its numbers are on their side and reach a target
DRAWS = 2000  # give up if this many draws in a row reach no target


def below(limit: Array | int, *salt: Array | int) -> Array:
    """Integers in 0..limit - 1 that depend only on `salt`; uniform up to an error of 2**-32."""
    value = np.zeros(1, np.uint64)
    for each in salt:
        value = mix(value ^ np.asarray(each, np.uint64))
    return ((value >> np.uint64(32)) * np.asarray(limit, np.uint64) >> np.uint64(32)).astype(np.int64)


def draw_numbers(preset: dict[str, Any], count: int, seed: int, rows: Array, attempt: int) -> Array:
    """The numbers of the problems `rows` at the `attempt`-th draw, shape (rows, count)."""
    places = np.arange(count)[None]
    column = rows[:, None]
    if preset["tiles"]:
        many = below(len(LARGE) + 1, seed, rows, attempt, 1)[:, None]  # large tiles: 0..4
        large, small = (
            tiles[np.argsort(below(2**32, seed, column, attempt, salt, np.arange(len(tiles))[None]), kind="stable")]
            for salt, tiles in ((2, LARGE), (3, SMALL))
        )
        large = np.pad(large, ((0, 0), (0, count)))[:, :count]
        return np.where(places < many, large, small[:, :count])
    low, high = preset["numbers"]
    return low + below(high - low + 1, seed, column, attempt, 2, places)


@lru_cache(1024)  # problems share some subsets; all of them would grow with the rows
def reachable_within(numbers: tuple[int, ...], largest: int) -> frozenset[int]:
    """The integers that `numbers`, each used once, can make with all intermediate results in 0..largest."""
    if len(numbers) == 1:
        return frozenset(numbers)
    values = set()
    for subset in range(1, 2 ** (len(numbers) - 1)):  # the last number is always in the right part
        left = tuple(n for i, n in enumerate(numbers) if subset >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not subset >> i & 1)
        for x in reachable_within(left, largest):
            for y in reachable_within(right, largest):
                values |= {x + y, abs(x - y), x * y}
                values |= {a // b for a, b in ((x, y), (y, x)) if b and a % b == 0}
    return frozenset(value for value in values if value <= largest)


def targets_of(preset: dict[str, Any], numbers: Array) -> Array:
    """Which targets of the preset's range each row of numbers may have, shape (rows, targets)."""
    low, high = preset["targets"]
    if preset["max_intermediate"] is not None:
        possible = np.zeros((len(numbers), high + 1), bool)
        for i, row in enumerate(np.sort(numbers, axis=1).tolist()):
            possible[i, [v for v in reachable_within(tuple(row), preset["max_intermediate"]) if v <= high]] = True
        return possible[:, low:]
    possible = reachable(numbers, low, high, integers=preset["integers"])
    if preset["must_use"]:
        without = sum(1 << SYMBOLS.index(operator) for operator in preset["must_use"])
        possible &= ~reachable(numbers, low, high, without=without)
    return possible


def generate(
    preset: dict[str, Any], rows: Array, seed: int, *, side: int | None = None, held_out_share: float = 0.0
) -> tuple[Array, Array, Array]:
    """Problems of a preset (configs/preset), by their indices.

    Args:
        rows: the indices of the problems, shape (rows,).
        side: draw again until the numbers belong to this side of the split (data_prep/split.py).
        held_out_share: the share of that split's test side.

    Returns:
        Numbers, shape (rows, 6), 0 if unused; how many are used; targets.

    Raises:
        UserError: the preset's numbers reach none of its targets.
    """
    low, high = preset["targets"]
    if len(rows) > (most := max(1, CELLS // (high - low + 1))):
        parts = [
            generate(preset, rows[start : start + most], seed, side=side, held_out_share=held_out_share)
            for start in range(0, len(rows), most)
        ]
        numbers, count, target = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return numbers, count, target
    seed %= 2**64  # it may be negative
    numbers, target = np.zeros((len(rows), MAX_COUNT), np.int64), np.zeros(len(rows), np.int64)
    count = np.asarray(preset["count"])[below(len(preset["count"]), seed, rows, 0)]
    for n in np.unique(count):
        left, draws = np.flatnonzero(count == n), 0
        for attempt in range(ATTEMPTS):
            drawn = draw_numbers(preset, int(n), seed, rows[left], attempt)
            kept = np.arange(len(left))
            if side is not None:
                hashes = hash_numbers(np.sort(drawn, axis=1), np.full(len(left), n))
                kept = np.flatnonzero(is_held_out(hashes, held_out_share) == (side == TEST))
            some, tried = targets_of(preset, drawn[kept]), len(kept)
            possible = some.sum(axis=1)
            column = np.nonzero(some)[1]  # the targets that can be reached, row after row
            kept, start, possible = (each[possible > 0] for each in (kept, np.cumsum(possible) - possible, possible))
            which = below(possible, seed, rows[left[kept]], attempt, 4)
            target[left[kept]] = low + column[start + which]
            numbers[left[kept], :n] = drawn[kept]
            left, before = np.delete(left, kept), len(left)
            if not len(left):
                break
            draws = 0 if len(left) < before else draws + tried
            if draws > DRAWS or attempt == ATTEMPTS - 1:
                raise UserError(
                    f"preset {preset['name']}: no targets in {preset['targets']} were found for {n} numbers in "
                    f"{preset['numbers']}; widen one of them"
                )
    return numbers, count, target


def distinct(
    preset: dict[str, Any], size: int, seed: int, *, side: int | None = None, held_out_share: float = 0.0
) -> tuple[Array, Array, Array]:
    """The first `size` different problems of a preset, in the form of `generate`.

    Raises:
        UserError: the preset has fewer.
    """
    parts, found, step = [], 0, max(LEAST, size // 8)
    for start in itertools.count(0, step):
        parts.append(generate(preset, np.arange(start, start + step), seed, side=side, held_out_share=held_out_share))
        numbers, count, target = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        _, first = np.unique(np.column_stack([np.sort(numbers, axis=1), target]), axis=0, return_index=True)
        chosen = np.sort(first)[:size]
        if len(chosen) == size:
            return numbers[chosen], count[chosen], target[chosen]
        if len(chosen) == found:
            break
        found = len(chosen)
        parts = [(numbers[chosen], count[chosen], target[chosen])]
    raise UserError(
        f"preset {preset['name']}: {size} different problems are needed, but it has only about {found}: widen "
        "its numbers or targets, or ask for fewer"
    )
