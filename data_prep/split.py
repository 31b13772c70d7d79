"""Splits problems into training and test problems: by a hash of the numbers, or as the published recipes did.

The numbers of the frozen test set (data_prep/test_set.py) are never in training, whatever the split (`is_reserved`).

`by_numbers` compares the SHA-256 of the sorted numbers with a fixed threshold. So a multiset of numbers is always on
the same side, whatever the order and size of the source and whatever the seed: no problem leaks, and a growing source
moves no row to the other side. A second hash, of numbers, target and seed, sorts the rows of a side, and a size takes
the first rows of that order. Equal problems have equal hashes, so this order also finds duplicates.

The recipes' splits choose rows by their place in the source, and keep duplicates.
"""

import hashlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.cli import UserError
from data_prep.solver import MAX_COUNT, Array
from data_prep.test_set import read_problems

TEST, TRAIN, NEITHER = 0, 1, 2
SIDES = ("test", "train")


def mix(values: Array) -> Array:
    """A bijection of 64-bit integers that looks random: splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def as_lists(numbers: Array, count: Array) -> pa.ListArray:
    """The first `count` of each row of `numbers`, shape (rows, most), as lists."""
    offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        offsets, pa.array(numbers[np.arange(numbers.shape[1]) < count[:, None]], pa.int64())
    )


def joined(lists: pa.ListArray, separator: str) -> pa.StringArray:
    """The integers of each list as text."""
    texts = pa.ListArray.from_arrays(lists.offsets, lists.values.cast(pa.string()))
    return pc.binary_join(texts, separator)


def padded(lists: list[list[int]]) -> tuple[Array, Array]:
    """Lists of numbers as rows of MAX_COUNT sorted numbers, 0 if unused, and their counts."""
    rows = [sorted(numbers) + [0] * (MAX_COUNT - len(numbers)) for numbers in lists]
    return np.array(rows, np.int64).reshape(-1, MAX_COUNT), np.array([len(numbers) for numbers in lists], np.int64)


def hash_numbers(numbers: Array, count: Array) -> Array:
    """The hash of each row that decides its side: the first 8 bytes of the SHA-256 of a text such as "3,7,25".

    Args:
        numbers: shape (rows, most), the first `count` of each row sorted.
        count: shape (rows,).
    """
    texts = joined(as_lists(numbers, count), ",").cast(pa.binary()).to_pylist()
    digests = b"".join([digest.digest() for digest in map(hashlib.sha256, texts)])
    return np.frombuffer(digests, ">u8")[::4].astype(np.uint64)


def is_below(hashes: Array, share: float) -> Array:
    """Whether hashes are among the lowest share < 1 of all."""
    return hashes < np.uint64(int(np.ceil(share * 2.0**64)))


@cache
def reserved_hashes() -> Array:
    """The hashes of the numbers of the frozen test set, sorted."""
    return np.sort(hash_numbers(*padded([problem["numbers"] for problem in read_problems()])))


def is_reserved(hashes: Array) -> Array:
    """Whether multisets of numbers are those of the frozen test set, which no training split may hold."""
    return np.isin(hashes, reserved_hashes())


def is_held_out(hashes: Array, share: float) -> Array:
    """Whether multisets of numbers belong to the test side: a share < 1 of all multisets, and all reserved ones."""
    return is_below(hashes, share) | is_reserved(hashes)


class Split(NamedTuple):
    """How rows are chosen. `places` are the source rows of a recipe, with side and rank; None for by_numbers."""

    held_out_share: float
    seed: int
    places: tuple[Array, Array, Array] | None


def make_split(config: dict[str, Any], total: int) -> Split:
    """The split of a configuration for a source of `total` rows.

    Raises:
        UserError: the source has fewer rows than the recipe takes.
    """
    split, seed = config["split"], config["seed"]
    if split["name"] == "by_numbers":
        return Split(config["held_out_share"], seed, None)
    train, test = split["train"], split["test"]
    if total < train + test:
        raise UserError(
            f"split={split['name']} takes {train + test:,} rows, and the source has {total:,}; use split=by_numbers"
        )
    if split["shuffle_seed"] is None:
        chosen = np.arange(train + test)
    else:
        from datasets import Dataset  # the recipes used its shuffle; the import takes a second

        shuffled = Dataset.from_dict({"row": np.arange(total)}).shuffle(seed=split["shuffle_seed"])
        parts = shuffled.select(range(train + test)).train_test_split(test_size=test, seed=seed)
        chosen = np.concatenate([parts["train"]["row"], parts["test"]["row"]])
    side = np.where(np.arange(len(chosen)) < train, TRAIN, TEST).astype(np.uint8)
    order = np.argsort(chosen)
    return Split(0.0, seed, (chosen[order], side[order], order.astype(np.uint64)))


def assign(split: Split, hashes: Array, target: Array, place: Array) -> tuple[Array, Array]:
    """Side and sort key of rows, from the hashes of their numbers, their targets and their places in the source."""
    if split.places is None:
        key = mix(hashes ^ mix(target.astype(np.uint64) + mix(np.array([split.seed % 2**64], np.uint64))))
        return np.where(is_held_out(hashes, split.held_out_share), TEST, TRAIN).astype(np.uint8), key
    places, side, rank = split.places
    found = np.minimum(np.searchsorted(places, place), len(places) - 1)
    there = places[found] == place
    # Spread the ranks over all 64-bit keys, as hashes are.
    spread = np.uint64(2**64 // len(places))
    return np.where(there, side[found], NEITHER).astype(np.uint8), rank[found] * spread
