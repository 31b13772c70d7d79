"""python benchmarks/data_speed.py [speed] [growth] [solver]: the cost of the data step, compared with `datasets.map`.

speed   Turns 490,364 different problems like the public set's, in one parquet file, into train and test parquet: by
        `datasets.map` with a function of one row, as TinyZero does; by `python -m data_prep` without the solver; and
        with it. Measures the work from opening the source to the last file, and the whole command; the median of five
        rounds.
growth  0.1, 1 and 10 million rows of four random numbers and a random target (of ten million, 1% occur twice), without
        and with the solver: seconds, and the peak memory of all processes together (proportional set size, ten
        samples a second).
solver  The solver alone, on the same 490,364 problems, on all cores.

Writes benchmarks/data_<name>.md, which docs/data.md repeats. Needs 2 GB in a temporary folder.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from peak_memory import held

from data_prep.datasheet import table
from data_prep.generate import distinct
from data_prep.solver import solve_many
from data_prep.split import as_lists

ROOT = Path(__file__).resolve().parent.parent
ROWS = 490_364
PRESET = {
    "name": "3to4", "count": [3, 4], "numbers": [1, 99], "tiles": False, "targets": [1, 100], "integers": False,
    "max_intermediate": None, "must_use": [],
}  # fmt: skip

# TinyZero's examples/data_preprocess/countdown.py, without its command line: the same calls, on a local file.
MAP = """
import sys
from time import perf_counter
from datasets import load_dataset
source, out, text = sys.argv[1:]
def process(example, index, split):
    numbers, target = example["nums"], example["target"]
    prompt = text.replace("{numbers}", str(numbers)).replace("{target}", str(target))
    return {
        "data_source": f"countdown/{len(numbers)}_numbers",
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": {"numbers": numbers, "target": target}},
        "extra_info": {"split": split, "index": index},
    }
started = perf_counter()
rows = load_dataset("parquet", data_files=source)["train"]
train = len(rows) - 1024
for split, places in (("train", range(train)), ("test", range(train, len(rows)))):
    part = rows.select(places)
    part = part.map(process, with_indices=True, fn_kwargs={"split": split}, remove_columns=["nums", "target"])
    part.to_parquet(f"{out}/{split}.parquet")
print(perf_counter() - started)
"""
# `python -m data_prep`, which also prints the seconds after Python and Hydra are ready.
OURS = """
import sys
from time import perf_counter
from data_prep import command

write_folder = command.write_folder
def timed(*arguments):
    started = perf_counter()
    result = write_folder(*arguments)
    print(perf_counter() - started, file=sys.stderr)
    return result
command.write_folder = timed
command.main()
"""


BASE = "datasets.map, a function of one row"


def make_source(path: Path, numbers: np.ndarray, count: np.ndarray, target: np.ndarray) -> None:
    pq.write_table(pa.table({"target": target, "nums": as_lists(numbers, count)}), path)


def timed(command: list[str], home: Path, weigh: bool = False) -> tuple[float, float, str]:
    """The seconds that a command takes; its peak memory in GiB with its children, if `weigh` (which slows it down); and
    what it prints."""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    started, most = perf_counter(), 0
    process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while weigh and process.poll() is None:
        most = max(most, sum(size for size, _ in held(process)))
        sleep(0.1)
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}: {errors.decode()}")
    return perf_counter() - started, most / 2**30, (output + errors).decode()


def ours(source: Path, out: Path, annotate: bool) -> list[str]:
    sizes = ["train_size=null", "test_size=null", f"annotate={str(annotate).lower()}"]
    return [sys.executable, "-c", OURS, "source=local", f"source.paths={source}", f"out={out}", *sizes]


def speed(scratch: Path, problems: tuple[np.ndarray, ...]) -> str:
    source = scratch / "source.parquet"
    make_source(source, *problems)
    text = (ROOT / "configs/prompt/tinyzero_base.yaml").read_text().split("content: |-\n")[1].replace("\n      ", "\n")
    (scratch / "map.py").write_text(MAP)
    ways = {
        BASE: lambda i: [
            sys.executable, str(scratch / "map.py"), str(source), str(scratch / f"map{i}"), text.strip(),
        ],
        "data_prep, annotate=false": lambda i: ours(source, scratch / f"plain{i}", False),
        "data_prep": lambda i: ours(source, scratch / f"solved{i}", True),
    }  # fmt: skip
    seconds = {way: [] for way in ways}
    for i in range(5):
        (scratch / f"map{i}").mkdir()
        for way, command in ways.items():
            whole, _, printed = timed(command(i), scratch / f"home{i}")
            work = next(float(line) for line in printed.splitlines() if re.fullmatch(r"\d+\.\d+", line))
            seconds[way].append((work, whole))
    rows = []
    for way, some in seconds.items():
        ratios = [
            [first[j] / mine[j] for first, mine in zip(*(seconds[w] for w in (BASE, way)), strict=True)] for j in (0, 1)
        ]
        work, whole = (median(each[j] for each in some) for j in (0, 1))
        rows.append(
            [
                way,
                f"{work:.1f}",
                f"{ROWS / work:,.0f}",
                f"{median(ratios[0]):.1f}",
                f"{whole:.1f}",
                f"{median(ratios[1]):.1f}",
            ]
        )
    header = [
        f"{ROWS:,} rows",
        "seconds of work",
        "rows a second",
        "times the first",
        "whole command",
        "times the first",
    ]
    return table(header, rows)


def growth(scratch: Path) -> str:
    rows = []
    for size in (100_000, 1_000_000, 10_000_000):
        source = scratch / f"{size}.parquet"
        rng = np.random.default_rng(size)
        make_source(source, rng.integers(1, 100, (size, 4)), np.full(size, 4), rng.integers(1, 101, size))
        cells = [f"{size:,}"]
        for annotate in (False, True):
            out = scratch / f"grown{size}{annotate}"
            seconds, _, _ = timed(ours(source, out, annotate), scratch / "home")
            _, memory, _ = timed(ours(source, Path(f"{out}-again"), annotate), scratch / "home", weigh=True)
            cells += [f"{seconds:.1f}", f"{memory:.2f}"]
            shutil.rmtree(out)
            shutil.rmtree(f"{out}-again")
        rows.append(cells)
    return table(["rows", "seconds, annotate=false", "GiB", "seconds", "GiB"], rows)


def solver(problems: tuple[np.ndarray, ...]) -> str:
    numbers, count, target = problems
    blocks = [
        (numbers[some, :n], target[some])
        for n in (3, 4)
        for some in np.array_split(np.flatnonzero(count == n), 16)
    ]  # fmt: skip
    started = perf_counter()
    with ProcessPoolExecutor() as pool:
        solved = list(pool.map(solve_many, *zip(*blocks, strict=True)))
    seconds = perf_counter() - started
    found = sum(int((each.solutions > 0).sum()) for each in solved)
    return f"{ROWS:,} problems solved in {seconds:.1f} s on {os.cpu_count()} cores, {found:,} of them solvable\n"


def main(what: list[str]) -> None:
    problems = None
    if {"speed", "solver"} & set(what):
        started = perf_counter()
        problems = distinct(PRESET, ROWS, 0)
        print(f"{ROWS:,} different problems generated in {perf_counter() - started:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        for name in what:
            if name == "growth":
                text = growth(Path(folder))
            else:
                text = speed(Path(folder), problems) if name == "speed" else solver(problems)
            (ROOT / "benchmarks" / f"data_{name}.md").write_text(text)
            print(text)


if __name__ == "__main__":
    main(sys.argv[1:] or ["speed", "growth", "solver"])
