"""Checks the rows of a source. Valid problems become arrays; every other row is rejected with its place and a reason.

A problem has 2 to 6 numbers in 1..10,000 and a target in 1..1,000,000, all integers. 3.0 is an integer; 3.5, true and
"3" are not. A column of integer lists, as in parquet, is checked as one array. Rows that fail there, and columns of
other types, are checked row by row.
"""

import csv
import io
import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.solver import MAX_COUNT, Array

MAX_NUMBER, MAX_TARGET = 10_000, 1_000_000


class Batch(NamedTuple):
    """Consecutive rows of a source as it holds them.

    What `data` holds depends on `kind`. "arrow": a record batch of the two columns, in Arrow's stream format; "jsonl":
    lines of text; "csv": pairs of the header and a record, which may have several lines; "synthetic": the arguments of
    the generator. `first` is the place of the first row in the whole source, from 0, and `row` its place in `file`,
    from 1.
    """

    kind: str
    data: Any
    file: str
    first: int
    row: int
    rows: int


class Problems(NamedTuple):
    """Valid rows: numbers, shape (rows, 6), 0 if unused; how many are used; target; place in the source."""

    numbers: Array
    count: Array  # type: ignore[assignment]  # hides tuple.count
    target: Array
    place: Array


def integer_fault(value: Any, largest: int) -> str | None:
    """What is wrong with a value that should be an integer in 1..largest; None if nothing is."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a bool"
    if isinstance(value, float):
        if not value.is_integer():
            return "a float that is no integer"
    elif not isinstance(value, int):
        return "not an integer"
    if value < 1:
        return "not positive"
    return f"larger than {largest:,}" if value > largest else None


def fault(numbers: Any, target: Any) -> tuple[str, str] | None:
    """The first fault of a row: "numbers" or "target", and what is wrong with it. None if the row is valid.

    >>> fault([3, True], 4)
    ('numbers', 'a bool')
    """
    if numbers is None:
        return "numbers", "null"
    if not isinstance(numbers, list):
        return "numbers", "no list"
    if not numbers:
        return "numbers", "an empty list"
    if not 2 <= len(numbers) <= MAX_COUNT:
        return "numbers", f"{len(numbers)} numbers, 2 to {MAX_COUNT} are expected"
    for value in numbers:
        if reason := integer_fault(value, MAX_NUMBER):
            return "numbers", reason
    reason = integer_fault(target, MAX_TARGET)
    return ("target", reason) if reason else None


def parse_csv(header: str, record: str, columns: tuple[str, str]) -> tuple[Any, Any]:
    """The two values of a CSV record. A field is read as JSON, or else as text."""
    try:
        names, fields = csv.reader([header, record])
    except csv.Error as error:
        raise ValueError(str(error)) from None
    if len(fields) != len(names):
        raise ValueError(f"{len(fields)} fields, the header has {len(names)}")

    def value(text: str) -> Any:
        try:
            return json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            return text

    return value(fields[names.index(columns[0])]), value(fields[names.index(columns[1])])


def parse_json(line: str, columns: tuple[str, str]) -> tuple[Any, Any]:
    """The two values of a JSON line; "metadata.numbers" is the field "numbers" of "metadata"."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("no JSON object")

    def value(name: str) -> Any:
        if name in row:
            return row[name]
        found = row
        for part in name.split("."):
            if not isinstance(found, dict) or part not in found:
                raise ValueError(f"no {name!r}")
            found = found[part]
        return found

    return value(columns[0]), value(columns[1])


def lists_of(column: pa.Array) -> tuple[Array, Array, Array] | None:
    """A column of lists of numbers as (lengths, values, whether each value is valid); None for another column."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return None
    if not (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)):
        return None
    numbers = as_numpy(column.flatten())
    return as_numpy(pc.list_value_length(column)).astype(np.int64), numbers, in_range(numbers, MAX_NUMBER)


def as_numpy(column: pa.Array) -> Array:
    """A column of numbers as an array, with 0 for null."""
    return (pc.fill_null(column, 0) if column.null_count else column).to_numpy(zero_copy_only=False)


def in_range(values: Array, largest: int) -> Array:
    """Which values are integers in 1..largest."""
    whole = True if values.dtype.kind in "iu" else values == np.floor(values)
    return (values >= 1) & (values <= largest) & whole


def clean_table(batch: Batch, table: pa.RecordBatch, columns: tuple[str, str]) -> tuple[Problems, list[dict[str, Any]]]:
    """`clean` of an Arrow record batch."""
    lists, targets = table.column(columns[0]), table.column(columns[1])
    whole = lists_of(lists)
    good = np.zeros(len(table), bool)
    if whole is not None and (pa.types.is_integer(targets.type) or pa.types.is_floating(targets.type)):
        lengths, values, right = whole
        wrong = np.concatenate([[0], np.cumsum(~right)])
        ends = np.cumsum(lengths)
        target = as_numpy(targets)
        good = (lengths >= 2) & (lengths <= MAX_COUNT) & (wrong[ends] == wrong[ends - lengths])
        good &= in_range(target, MAX_TARGET)
    rest = np.flatnonzero(~good)
    others = (column.take(pa.array(rest)).to_pylist() for column in (lists, targets))
    some, rejected = clean_rows(batch, list(zip(rest.tolist(), *others, strict=True)), columns)
    if not good.any():
        return some, rejected
    numbers = np.zeros((int(good.sum()), MAX_COUNT), np.int64)
    numbers[np.arange(MAX_COUNT) < lengths[good][:, None]] = values[np.repeat(good, lengths)]
    place = batch.first + np.flatnonzero(good)
    return merge(Problems(numbers, lengths[good], target[good].astype(np.int64), place), some), rejected


def merge(some: Problems, others: Problems) -> Problems:
    """Two sets of problems as one, in the order of the source."""
    if not len(others.place):
        return some
    order = np.argsort(np.concatenate([some.place, others.place]))
    return Problems(*(np.concatenate(pair)[order] for pair in zip(some, others, strict=True)))


def clean_rows(
    batch: Batch, rows: list[tuple[int, Any, Any]], columns: tuple[str, str]
) -> tuple[Problems, list[dict[str, Any]]]:
    """`clean` of rows (place in the batch, numbers, target). For a row that cannot be read, numbers is a ValueError."""
    kept, rejected = [], []
    for i, numbers, target in rows:
        whole = not isinstance(numbers, ValueError)
        found = fault(numbers, target) if whole else ("row", str(numbers))
        if found is None:
            kept.append((i, numbers, target))
            continue
        column = {"numbers": columns[0], "target": columns[1]}.get(found[0])
        value = numbers if found[0] == "numbers" else target
        rejected.append(
            {
                "place": batch.first + i,
                "file": batch.file,
                "row": batch.row + i,
                "column": column,
                "value": repr(value)[:80],
                "reason": found[1],
            }
        )
    numbers = np.zeros((len(kept), MAX_COUNT), np.int64)
    for j, (_, some, _) in enumerate(kept):
        numbers[j, : len(some)] = some
    count = np.array([len(some) for _, some, _ in kept], np.int64)
    target = np.array([int(goal) for _, _, goal in kept], np.int64)
    return Problems(numbers, count, target, batch.first + np.array([i for i, _, _ in kept], np.int64)), rejected


def clean(batch: Batch, columns: tuple[str, str]) -> tuple[Problems, list[dict[str, Any]]]:
    """The problems of a batch, and its rejected rows, each as a dictionary with its place and the reason.

    Args:
        columns: the names of the columns of numbers and of targets.
    """
    if batch.kind == "arrow":
        return clean_table(batch, pa.ipc.open_stream(io.BytesIO(batch.data)).read_next_batch(), columns)
    rows: list[tuple[int, Any, Any]] = []
    for i, line in enumerate(batch.data):
        try:
            values = parse_csv(line[0], line[1], columns) if batch.kind == "csv" else parse_json(line, columns)
            rows.append((i, *values))
        except ValueError as error:
            rows.append((i, error, line[1] if batch.kind == "csv" else line))
    return clean_rows(batch, rows, columns)
