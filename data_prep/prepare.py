"""From a source to the files of a data folder: counts and writes what the steps (data_prep/steps.py) yield."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_prep.cli import UserError
from data_prep.datasheet import Leaks, Portrait
from data_prep.engines import Engine
from data_prep.prompts import to_table
from data_prep.render import token_counter
from data_prep.solver import Array
from data_prep.sources import Source
from data_prep.split import SIDES, TEST, TRAIN, is_reserved, make_split
from data_prep.steps import RANGE, Task, ood_rows

Progress = Callable[[str, int, int], None]

RESERVED = "reserved for the bench"  # training rows that a recipe takes and whose numbers are in the frozen test set
ROW_GROUP = 32_768  # rows of a parquet row group
# Columns with few different values; parquet's dictionary would not help the others.
REPEATED = ["data_source", "ability", "prompt.list.element.role", "reward_model.style", "extra_info.split"]


class Writer:
    """One parquet file of problems, always in row groups of ROW_GROUP rows."""

    def __init__(
        self, path: Path, split: str, prompt: dict[str, Any], data_source: str | None, portrait: Portrait
    ) -> None:
        self.path, self.split, self.prompt, self.data_source, self.portrait = path, split, prompt, data_source, portrait
        self.pending: list[tuple[Array, Array]] = []
        self.waiting = self.written = 0
        self.file: pq.ParquetWriter | None = None
        self.thread = ThreadPoolExecutor(1)  # encodes one row group while the next is made
        self.writing = self.thread.submit(lambda: None)  # the row group before; none yet

    def add(self, rows: Array, solved: Array) -> None:
        self.pending.append((rows, solved))
        self.waiting += len(rows)
        while self.waiting >= ROW_GROUP:
            self.flush(ROW_GROUP)

    def flush(self, size: int) -> None:
        """Write the first `size` waiting rows."""
        rows, solved = (np.concatenate(parts) for parts in zip(*self.pending, strict=True))
        self.pending, self.waiting = [(rows[size:], solved[size:])], self.waiting - size
        rows, solved = rows[:size], solved[:size]
        table = to_table(self.prompt, rows, solved, self.split, self.written, self.data_source)
        self.portrait.add(rows, solved)
        if self.file is None:
            self.file = pq.ParquetWriter(
                self.path, table.schema, compression="zstd", compression_level=1, use_dictionary=REPEATED,
                write_statistics=False,
            )  # fmt: skip
        self.writing.result()  # raises its error if it failed
        self.writing = self.thread.submit(self.file.write_table, table)
        self.written += size

    def close(self) -> None:
        """Write the remaining rows. A set without rows gets no file, as verl (`datasets`) cannot load an empty one."""
        if self.waiting:
            self.flush(self.waiting)
        self.writing.result()
        if self.file is not None:
            self.file.close()


class Rejects:
    """Writes rejected.jsonl and counts the reasons; at most the share `allowed` of `total` rows may be in it."""

    def __init__(self, path: Path, total: int, allowed: float) -> None:
        self.file, self.total, self.allowed = path.open("w", encoding="utf-8"), total, allowed
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, Any] | None = None

    def add(self, rejected: list[dict[str, Any]]) -> None:
        for row in rejected:
            del row["place"]
            self.first = self.first or row
            self.reasons[f"{row['column']}: {row['reason']}" if row["column"] else row["reason"]] += 1
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def check(self) -> None:
        """Raise UserError if too many rows were rejected; all of them are known."""
        self.file.close()
        if self.first is not None and self.reasons.total() > self.allowed * self.total:
            where = f"{self.first['file']} row {self.first['row']}"
            where += f", column {self.first['column']}" if self.first["column"] else ""
            raise UserError(
                f"{self.reasons.total():,} of {self.total:,} rows are not valid problems, more than "
                f"max_rejected={self.allowed}; the first: {where}: {self.first['reason']}: {self.first['value']}; "
                "correct them, raise max_rejected, or name other columns with source.columns.numbers= and "
                "source.columns.target="
            )


def too_few(side: str, size: int, found: int, config: dict[str, Any]) -> UserError:
    """The error of a side that has fewer problems than its size."""
    what = "that can be solved " if config["unsolvable"] != "keep" else ""
    advice = "take a smaller size"
    if config["source"]["name"] == "synthetic":
        advice += ", raise preset.rows"
    if config["split"]["name"] == "by_numbers":
        advice += f", or change held_out_share={config['held_out_share']}"
    return UserError(f"{side}_size={size:,}, but only {found:,} problems {what}are on that side; {advice}")


def most(size: str) -> int:
    """N of the size `up to N`."""
    return int(size.removeprefix("up to "))


class Preparation:
    """The files and the counts of a preparation, while its ranges are processed."""

    def __init__(self, config: dict[str, Any], source: Source, folder: Path, progress: Progress) -> None:
        self.config, self.source, self.folder, self.progress = config, source, folder, progress
        self.by_numbers = config["split"]["name"] == "by_numbers"
        columns = config["source"].get("columns") or {"numbers": "", "target": ""}
        self.bits = max(0, int(source.rows / RANGE - 1)).bit_length()
        split = make_split(config, source.rows)
        names = columns["numbers"], columns["target"]
        self.task = Task(split, names, self.bits, self.by_numbers, config["annotate"])
        self.portraits: dict[str, Portrait] = {}
        self.measure = token_counter(config["prompt"], config["tokenizer"]) if config["tokenizer"] else None
        self.leaks = Leaks()
        self.rejects = Rejects(folder / "rejected.jsonl", source.rows, config["max_rejected"])
        self.writers = [self.writer(side) for side in SIDES]
        self.apart = self.writer("unsolvable") if config["unsolvable"] == "apart" else None
        wanted = [config[f"{side}_size"] for side in SIDES]
        self.at_most = [isinstance(size, str) for size in wanted]  # `up to N`
        self.sizes = [most(size) if isinstance(size, str) else size for size in wanted]
        self.taken, self.counts, self.rows_read = [0, 0], Counter[str](), 0

    def writer(self, name: str, data_source: str | None = None) -> Writer:
        self.portraits[name] = Portrait(self.measure, keeps_duplicates=not self.by_numbers)
        path = self.folder / f"{name}.parquet"
        return Writer(path, name, self.config["prompt"], data_source, self.portraits[name])

    def read(self, rows: int) -> None:
        self.rows_read += rows
        self.progress("reading", self.rows_read, self.source.rows)

    def is_wanted(self, number: int) -> bool:
        """Whether the rows of this range still have to be solved."""
        size, taken = self.sizes[number >> self.bits], self.taken[number >> self.bits]
        return bool(self.config["annotate"]) and (size is None or taken < size)

    def write_ood(self, engine: Engine) -> None:
        """Write the sets out of distribution. The training rows, which come later, are compared with them."""
        config, ood, tasks = self.config, self.config["ood"], []
        for name in ood["names"]:
            preset = config["preset"] | ood["sets"][name] | {"name": f"ood.sets.{name}"}
            tasks.append((preset, ood["size"], config["seed"], self.task, config["held_out_share"]))
        for name, (rows, solved) in zip(ood["names"], engine.map(ood_rows, tasks), strict=True):
            out = self.writer(f"ood_{name}", name)
            out.add(rows, solved)
            out.close()
            self.leaks.test(f"ood_{name}", rows)

    def take(self, side: int, before: int, rows: Array, solved: Array) -> None:
        """Write as many rows of a range as its side still needs.

        Args:
            before: number of rows in the range before duplicates were dropped.
            rows, solved: the rows in order, and their annotations.
        """
        size, counts = self.sizes[side], self.counts
        counts["duplicates"] += before - len(rows)
        if side == TRAIN:  # by_numbers has put them on the test side; a recipe's split chooses by place
            free = ~is_reserved(rows["hash"])
            counts[RESERVED] += int((~free).sum())
            rows, solved = rows[free], solved[free]
        keep = np.ones(len(rows), bool) if self.config["unsolvable"] == "keep" else solved["solutions"] != 0
        last = len(rows)
        if size is not None:  # the first rows that hold as many as are still needed
            last = min(last, int(np.searchsorted(np.cumsum(keep), size - self.taken[side])) + 1)
            last *= self.taken[side] < size
        counts["not selected"] += len(rows) - last
        rows, solved, keep = rows[:last], solved[:last], keep[:last]
        counts["unsolvable"] += int((~keep).sum())
        if self.apart is not None:
            self.apart.add(rows[~keep], solved[~keep])
        rows, solved = rows[keep], solved[keep]
        self.taken[side] += len(rows)
        self.writers[side].add(rows, solved)
        if side == TEST:
            self.leaks.test("test", rows)
        else:
            self.leaks.train(rows)

    def close(self) -> None:
        """Check the sizes, and close all files."""
        self.rejects.check()
        for name, size, found, at_most in zip(SIDES, self.sizes, self.taken, self.at_most, strict=True):
            known = found + (name == "train") * self.counts[RESERVED]
            if size is not None and known < size and not at_most:
                raise too_few(name, size, found, self.config)
            if not found:
                raise UserError(
                    f"none of the {self.source.rows:,} rows is on the {name} side: take more rows, or "
                    "another held_out_share"
                )
        for each in [*self.writers, *([self.apart] if self.apart else [])]:
            each.close()

    def summary(self) -> dict[str, Any]:
        """The content of the datasheet."""
        counts, taken, total = self.counts, self.taken, self.source.rows
        rejected = self.rejects.reasons.total()
        known = rejected + sum(taken) + counts.total()
        return {
            "rows": {
                "in": total,
                "rejected": rejected,
                "duplicates": counts["duplicates"],
                "unsolvable": counts["unsolvable"],
                RESERVED: counts[RESERVED],
                "not selected": counts["not selected"] + total - known,  # a recipe's split skips rows from the start
                "train": taken[1],
                "test": taken[0],
            },
            "rejected": dict(self.rejects.reasons.most_common()),
            "sets": {name: portrait.summary() for name, portrait in self.portraits.items() if portrait.rows},
            "leaks": self.leaks.summary(),
        }


def prepare(config: dict[str, Any], source: Source, engine: Engine, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write all parquet files and rejected.jsonl into `folder`, which is empty.

    Args:
        progress: gets the name of the present work, how much of it is done, and how much there is.

    Returns:
        The content of the datasheet.

    Raises:
        UserError: there are too few rows for a size, or too many are rejected.
    """
    work, side = Preparation(config, source, folder, progress), TEST
    for i, before, rows, solved in engine.ranges(
        source.batches(), work.task, work.read, work.rejects.add, work.is_wanted
    ):
        work.rejects.check()
        if side == TEST != i >> work.bits:
            work.write_ood(engine)
        side = i >> work.bits
        work.take(side, before, rows, solved)
        progress("writing", i + 1, 2 << work.bits)
    work.close()
    return work.summary()
