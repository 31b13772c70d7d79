"""The frozen test set as a data folder: its problems under one prompt, for verl."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_prep.folder import replaced
from data_prep.manifest import is_made, write_manifest, written_manifest
from data_prep.prompts import to_table
from data_prep.solver import MAX_COUNT
from data_prep.steps import ROW, unsolved
from data_prep.test_set import identity, read_problems


def write_bench(prompt: dict[str, Any], out: Path) -> None:
    """Write test.parquet, with the problems in the order of their ids, and manifest.json; nothing if they are there.

    The folder `out` is replaced as a whole.

    Raises:
        UserError: the folder holds something else, or assets/bench is damaged.
    """
    about = {"source": {"name": "bench"} | identity(), "configuration": {"prompt": prompt}}
    problems = read_problems()
    if is_made(out, written_manifest(out), about):
        return
    rows, solved = np.zeros(len(problems), ROW), unsolved(len(problems))  # the evaluation asks the solver
    rows["count"] = [len(row["numbers"]) for row in problems]
    rows["numbers"] = [row["numbers"] + [0] * (MAX_COUNT - len(row["numbers"])) for row in problems]
    rows["target"] = [row["target"] for row in problems]
    solved["solutions"] = [row["solutions"] for row in problems]
    table = to_table(prompt, rows, solved, "test", 0, "bench")
    with replaced(out) as folder:
        pq.write_table(table, folder / "test.parquet", compression="zstd")
        write_manifest(folder, out, about)
