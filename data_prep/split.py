"""Which problems train and which test: by a hash of the numbers, or as the published recipes chose.

`by_numbers`: the SHA-256 of the sorted numbers decides, by a fixed threshold, so whatever the order or size of a source
and whatever the seed, a multiset of numbers is always on the same side: no problem leaks, and a source that grows moves
no row across. Within a side rows stand in the order of a second hash, of numbers, target and seed; a size takes the
first so many of them. Equal problems have equal hashes, so this order also finds duplicates.

The recipes choose by place in the source, and keep duplicates.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.cli import UserError

Array = NDArray[Any]

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


def hash_numbers(numbers: Array, count: Array) -> Array:
    """The hash that decides the side, for each row: the first 8 bytes of the SHA-256 of "3,7,25".

    Args:
        numbers: shape (rows, most), the first `count` of each row sorted.
        count: shape (rows,).
    """
    texts = joined(as_lists(numbers, count), ",").cast(pa.binary()).to_pylist()
    digests = b"".join([digest.digest() for digest in map(hashlib.sha256, texts)])
    return np.frombuffer(digests, ">u8")[::4].astype(np.uint64)


def is_held_out(hashes: Array, share: float) -> Array:
    """Whether multisets of numbers belong to the test side; `share` < 1 of all multisets do."""
    return hashes < np.uint64(int(np.ceil(share * 2.0**64)))


class Split(NamedTuple):
    """How rows are chosen. `places`: source rows that a recipe takes, with side and rank; None for by_numbers."""

    held_out_share: float
    seed: int
    places: tuple[Array, Array, Array] | None


def make_split(config: dict[str, Any], seed: int, total: int) -> Split:
    """The split of a configuration for a source of `total` rows.

    Raises:
        UserError: the source has fewer rows than the recipe takes, or the share makes no sense.
    """
    split = config["split"]
    if split["name"] == "by_numbers":
        if not 0 < config["held_out_share"] < 1:
            raise UserError(f"held_out_share={config['held_out_share']}: a share between 0 and 1 is expected")
        return Split(config["held_out_share"], seed, None)
    train, test = split["train"], split["test"]
    if total < train + test:
        raise UserError(
            f"split={split['name']} takes {train + test:,} rows, and the source has {total:,}; use split=by_numbers"
        )
    if split["shuffle_seed"] is None:
        chosen = np.arange(train + test)
    else:
        from datasets import Dataset  # its shuffle is what the recipes used; it takes a second to import

        shuffled = Dataset.from_dict({"row": np.arange(total)}).shuffle(seed=split["shuffle_seed"])
        parts = shuffled.select(range(train + test)).train_test_split(test_size=test, seed=seed)
        chosen = np.concatenate([parts["train"]["row"], parts["test"]["row"]])
    side = np.where(np.arange(len(chosen)) < train, TRAIN, TEST).astype(np.uint8)
    order = np.argsort(chosen)
    return Split(0.0, seed, (chosen[order], side[order], order.astype(np.uint64)))


def assign(split: Split, hashes: Array, target: Array, place: Array) -> tuple[Array, Array]:
    """Side and order (a key to sort by) of rows, from the hashes of their numbers, targets and places in the source."""
    if split.places is None:
        key = mix(hashes ^ mix(target.astype(np.uint64) + mix(np.array([split.seed % 2**64], np.uint64))))
        return np.where(is_held_out(hashes, split.held_out_share), TEST, TRAIN).astype(np.uint8), key
    places, side, rank = split.places
    found = np.minimum(np.searchsorted(places, place), len(places) - 1)
    there = places[found] == place
    # Spread over the 64-bit keys, as hashes are.
    spread = np.uint64(2**64 // len(places))
    return np.where(there, side[found], NEITHER).astype(np.uint8), rank[found] * spread


def held_out(numbers: Sequence[int], share: float) -> bool:
    """`is_held_out` of one multiset of numbers."""
    row = np.sort(np.array([numbers]), axis=1)
    return bool(is_held_out(hash_numbers(row, np.array([len(numbers)])), share)[0])
