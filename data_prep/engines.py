"""Who runs the steps: this machine's cores, or a Ray cluster. What comes out is the same.

Both hand the ranges over in order: of the test side, then of the training side. Locally, rows wait on disk between the
two steps, so that memory does not grow with the source; on Ray, in its object store, which spills to disk.
"""

import ctypes
import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas  # noqa: F401  # Arrow imports it at its first array: once here, and not in every worker
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.clean import Batch
from data_prep.cli import UserError
from data_prep.steps import ROW, SOLVED, Task, first_step, range_of, second_step

Array = NDArray[Any]
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Progress = Callable[[int], None]
Rejected = list[dict[str, Any]]


class Engine(Protocol):
    """What the preparation asks of an engine."""

    def call(self, function: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> list[Any]:
        """`function` of each task, in order."""

    def ranges(
        self, batches: Iterable[Batch], task: Task, progress: Progress, reject: Callable[[Rejected], None],
        annotate: Callable[[int], bool],
    ) -> Iterator[tuple[int, int, Array, Array]]:  # fmt: skip
        """Of each range in order: its number, its rows before `second_step`, and what that made of them.

        `progress` is told of rows read, `reject` of rejected rows in the order of the source, before the first range
        comes; `annotate` is asked of a range's number whether its rows are still to be solved (by Local; Ray's workers
        have solved them all by then).
        """

    def close(self) -> None:
        """Nothing more will be asked."""


def end_with_parent() -> None:
    """As a worker: leave Ctrl-C to the parent, and end when it ends. A fork would else live on and hold its locks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Local:
    """The cores of this machine; `workers` processes, or with one this process itself."""

    def __init__(self, workers: int, scratch: Path) -> None:
        self.scratch = scratch
        self.workers = workers
        self.pool = None
        if workers > 1:
            # Forked, which starts at once, and now, while Arrow has no threads that a fork would leave behind.
            self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=end_with_parent)
            self.pool.submit(int).result()

    def call(self, function: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> list[Any]:
        return list(self.map(function, iter(tasks)))

    def map(self, function: Callable[..., Any], tasks: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
        """`function` of each task, in order, a few tasks ahead of whoever takes the results."""
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
            raise UserError("a worker process was killed, perhaps for want of memory; try workers=1") from None

    def ranges(
        self, batches: Iterable[Batch], task: Task, progress: Progress, reject: Callable[[Rejected], None],
        annotate: Callable[[int], bool],
    ) -> Iterator[tuple[int, int, Array, Array]]:  # fmt: skip
        runs: list[tuple[Path, Array]] = []
        tasks = ((batch, task, self.scratch / f"{i}.rows") for i, batch in enumerate(batches))
        for path, starts, rejected, read in self.map(write_run, tasks):
            runs.append((path, starts))
            reject(rejected)
            progress(read)
        slices = [[(path, int(at[i]), int(at[i + 1] - at[i])) for path, at in runs] for i in range(2 << task.bits)]
        results = self.map(finish_range, ((some, task, annotate(i)) for i, some in enumerate(slices)))
        for i, (rows, solved) in enumerate(results):
            yield i, sum(size for _, _, size in slices[i]), rows, solved

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def write_run(batch: Batch, task: Task, path: Path) -> tuple[Path, Array, Rejected, int]:
    """`first_step`, its rows to a file: the file, where in it each range starts (and the last ends), the rejected rows,
    and how many rows were read."""
    rows, rejected = first_step(batch, task)
    rows.tofile(path)
    starts = np.searchsorted(range_of(rows, task), np.arange((2 << task.bits) + 1))
    return path, starts, rejected, batch.rows


def finish_range(slices: list[tuple[Path, int, int]], task: Task, annotate: bool) -> tuple[Array, Array]:
    """`second_step` of one range: of each file so many rows from some row on."""
    parts = [np.fromfile(path, ROW, size, offset=start * ROW.itemsize) for path, start, size in slices]
    return second_step(np.concatenate(parts), task, annotate)


def pack(records: Array) -> pa.FixedSizeBinaryArray:
    """Records as an Arrow column of bytes."""
    buffer = pa.py_buffer(np.ascontiguousarray(records).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(records.dtype.itemsize), len(records), [None, buffer])


def unpack(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> Array:
    """What `pack` packed."""
    return np.frombuffer(b"".join(column.to_pylist()), dtype)


class OnRay:
    """The Ray cluster that this process is connected to, or can connect to (RAY_ADDRESS), with Ray Data."""

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
            ray.init(log_to_driver=False, logging_level="error")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False

    def call(self, function: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> list[Any]:
        return [function(*task) for task in tasks]  # small sets, and a user's error stays one line

    def ranges(
        self, batches: Iterable[Batch], task: Task, progress: Progress, reject: Callable[[Rejected], None],
        annotate: Callable[[int], bool],
    ) -> Iterator[tuple[int, int, Array, Array]]:  # fmt: skip
        import pickle

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

        # One block a batch, put into the object store as it is read.
        blocks = [self.ray.put(pa.table({"batch": pa.array([pickle.dumps(batch)], pa.binary())})) for batch in batches]
        data = (
            self.ray.data.from_arrow_refs(blocks)
            .map_batches(first, batch_format="pyarrow", batch_size=None)
            .groupby(
                "range", num_partitions=min(2 << task.bits, 200)
            )  # 200 is Ray's own number, however little there is
            .map_groups(second, batch_format="pyarrow")
            .sort(["range", "order"])
        )
        pending: list[pa.Table] = []
        for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
            for i in table["range"].unique().to_pylist():
                part = table.filter(pa.compute.equal(table["range"], i))
                if pending and pending[0]["range"][0].as_py() != i:
                    yield from self.whole(pending, reject, progress)
                    pending = []
                pending.append(part)
        if pending:
            yield from self.whole(pending, reject, progress)

    def whole(
        self, parts: list[pa.Table], reject: Callable[[Rejected], None], progress: Progress
    ) -> Iterator[tuple[int, int, Array, Array]]:
        """A range whose parts are all there, or the rejected rows (range -1)."""
        table = pa.concat_tables(parts)
        i = table["range"][0].as_py()
        progress(table["before"][0].as_py())
        if i < 0:
            rejected = [json.loads(text) for text in table["rejected"].to_pylist()]
            reject(sorted(rejected, key=lambda row: row["place"]))
        else:
            yield i, table["before"][0].as_py(), unpack(table["row"], ROW), unpack(table["solved"], SOLVED)

    def close(self) -> None:
        """The cluster is not ours to end."""
