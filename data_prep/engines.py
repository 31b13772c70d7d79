"""Run the steps of the preparation on this machine's cores or on a Ray cluster, with the same result.

Both engines yield the ranges in order: first those of the test side, then those of the training side. Between the two
steps the rows are on disk (locally) or in Ray's object store, which spills to disk, so that memory does not grow with
the source.
"""

import ctypes
import json
import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # noqa: F401  # Arrow imports it with its first array; here it is imported once and not in every worker
import pyarrow as pa

from data_prep.clean import Batch
from data_prep.cli import UserError
from data_prep.hub import in_one_clause
from data_prep.solver import Array
from data_prep.steps import ROW, SOLVED, Task, first_step, range_of, second_step

PR_SET_PDEATHSIG = 1  # linux/prctl.h

Progress = Callable[[int], None]
Rejected = list[dict[str, Any]]


def end_with_parent() -> None:
    """In a worker: ignore Ctrl-C, and end when the parent ends. Otherwise a fork would live on and hold its locks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Local:
    """The cores of this machine: `workers` processes, or this process itself if `workers` is 1."""

    def __init__(self, workers: int, scratch: Path) -> None:
        self.scratch = scratch
        self.workers = workers
        self.pool = None
        if workers > 1:
            # A fork starts fastest. It is made now, because later Arrow has threads, which a fork does not copy.
            self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=end_with_parent)
            self.pool.submit(int).result()

    def map(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The results of `function(*task)` in order, computed only a few tasks ahead of the caller."""
        if self.pool is None:
            yield from (function(*task) for task in tasks)
            return
        waiting: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                waiting.append(self.pool.submit(function, *task))
                if len(waiting) > 2 * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps because memory ran out; try workers=1") from None

    def ranges(
        self, batches: Iterable[Batch], task: Task, progress: Progress, reject: Callable[[Rejected], None],
        annotate: Callable[[int], bool],
    ) -> Iterator[tuple[int, int, Array, Array]]:  # fmt: skip
        """For each range in order: its number, its number of rows before `second_step`, and what `second_step` returns.

        Args:
            progress: gets the number of rows that were read.
            reject: gets rejected rows in the order of the source, before the first range.
            annotate: whether the rows of a range, by its number, still have to be solved.
        """
        runs: list[tuple[Path, Array]] = []
        tasks = ((batch, task, self.scratch / f"{i}.rows") for i, batch in enumerate(batches))
        for path, starts, rejected, read in self.map(write_run, tasks):
            runs.append((path, starts))
            reject(rejected)
            progress(read)

        def slices(i: int) -> list[tuple[Path, int, int]]:  # not kept: they grow with the square of the rows
            return [(path, int(at[i]), int(at[i + 1] - at[i])) for path, at in runs]

        results = self.map(finish_range, ((slices(i), task, annotate(i)) for i in range(2 << task.bits)))
        for i, (rows, solved) in enumerate(results):
            yield i, sum(size for _, _, size in slices(i)), rows, solved

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def write_run(batch: Batch, task: Task, path: Path) -> tuple[Path, Array, Rejected, int]:
    """Run `first_step` and write its rows to a file.

    Returns:
        The file; the row at which each range starts in it, and the end of the last; rejected rows; how many were read.
    """
    rows, rejected = first_step(batch, task)
    path.write_bytes(rows.tobytes())  # `tofile` does not say that a disk is full
    starts = np.searchsorted(range_of(rows, task), np.arange((2 << task.bits) + 1))
    return path, starts, rejected, batch.rows


def finish_range(slices: list[tuple[Path, int, int]], task: Task, annotate: bool) -> tuple[Array, Array]:
    """Run `second_step` on one range, which is a slice (file, first row, number of rows) of each file."""
    parts = [np.fromfile(path, ROW, size, offset=start * ROW.itemsize) for path, start, size in slices]
    return second_step(np.concatenate(parts), task, annotate)


def pack(records: Array) -> pa.FixedSizeBinaryArray:
    """Records as an Arrow column of bytes."""
    buffer = pa.py_buffer(np.ascontiguousarray(records).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(records.dtype.itemsize), len(records), [None, buffer])


def unpack(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> Array:
    """The records that `pack` was given."""
    return np.frombuffer(b"".join(column.to_pylist()), dtype)


class OnRay:
    """Ray Data on the cluster that this process is connected to, or else on that of RAY_ADDRESS."""

    def __init__(self) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise UserError(
                f"engine=ray needs Ray Data ({error}); pip install 'ray[data]', or use engine=local"
            ) from None
        self.ray = ray
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=False, logging_level="error")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"engine=ray: {in_one_clause(error)}; RAY_ADDRESS names the cluster, or use engine=local"
                ) from None
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False

    def map(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        return (function(*task) for task in tasks)  # the sets are small, and a UserError stays one line

    def ranges(
        self, batches: Iterable[Batch], task: Task, progress: Progress, reject: Callable[[Rejected], None],
        annotate: Callable[[int], bool],
    ) -> Iterator[tuple[int, int, Array, Array]]:  # fmt: skip
        """As of Local; Ray's workers solve all rows, without asking `annotate`."""

        def first(table: pa.Table) -> pa.Table:
            (data,) = table["batch"].to_pylist()
            rows, rejected = first_step(pickle.loads(data), task)
            blank = np.zeros(len(rejected), ROW)
            return pa.table(
                {
                    "range": pa.array(np.concatenate([range_of(rows, task), np.full(len(rejected), -1)]), pa.int64()),
                    "row": pack(np.concatenate([rows, blank])),
                    "rejected": pa.array([None] * len(rows) + [json.dumps(each) for each in rejected], pa.string()),
                }
            )

        def second(table: pa.Table) -> pa.Table:
            i, size = table["range"][0].as_py(), len(table)
            if i < 0:
                rows, solved, rejected = np.zeros(size, ROW), np.zeros(size, SOLVED), table["rejected"].combine_chunks()
            else:
                rows, solved = second_step(unpack(table["row"], ROW), task, task.annotate)
                rejected = pa.nulls(len(rows), pa.string())
            return pa.table(
                {
                    "range": pa.repeat(i, len(rows)),
                    "order": pa.array(np.arange(len(rows))),
                    "before": pa.repeat(size, len(rows)),
                    "row": pack(rows),
                    "solved": pack(solved),
                    "rejected": rejected,
                }
            )

        # Each batch is one block, which goes into the object store when it is read.
        blocks = [self.ray.put(pa.table({"batch": pa.array([pickle.dumps(batch)], pa.binary())})) for batch in batches]
        data = (
            self.ray.data.from_arrow_refs(blocks)
            .map_batches(first, batch_format="pyarrow", batch_size=None)
            .groupby("range", num_partitions=min(2 << task.bits, 200))  # 200: Ray's own, however little there is
            .map_groups(second, batch_format="pyarrow")
            .sort(["range", "order"])
        )
        tables = data.iter_batches(batch_size=None, batch_format="pyarrow")
        named = ((i, table) for table in tables for i in table["range"].unique().to_pylist())
        parts = ((i, table.filter(pa.compute.equal(table["range"], i))) for i, table in named)
        for i, same in groupby(parts, key=itemgetter(0)):
            whole = pa.concat_tables(part for _, part in same)
            before = whole["before"][0].as_py()
            progress(before)
            if i < 0:
                rejected = [json.loads(text) for text in whole["rejected"].to_pylist()]
                reject(sorted(rejected, key=lambda row: row["place"]))
            else:
                yield i, before, unpack(whole["row"], ROW), unpack(whole["solved"], SOLVED)

    def close(self) -> None:
        """Nothing: the cluster was not started here."""


Engine = Local | OnRay
