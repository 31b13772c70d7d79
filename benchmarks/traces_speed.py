"""python benchmarks/traces_speed.py [traces]: the seconds that `python -m data_prep.traces` takes for 100,000 traces.

The problems are 3 or 4 numbers up to 99, made by `python -m data_prep` beforehand. Each row of the table is the whole
command, from its start to its end, the median of three: on one core, on all, and in Chinese. Seconds of CPU are those
of all its processes, which other work on the machine changes little. Prints the table and writes
benchmarks/traces_speed.md, which docs/warm_start.md repeats. Needs 1 GB in a temporary folder.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from time import perf_counter

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3
WAYS = {"one core": ["workers=1"], "all cores": [], "all cores, `language=zh`": ["language=zh"]}


def seconds(module: str, *overrides: str) -> tuple[float, float]:
    """The seconds of a command, and those of CPU."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started, before = perf_counter(), getrusage(RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", module, *overrides], cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    taken, after = perf_counter() - started, getrusage(RUSAGE_CHILDREN)
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(traces: int) -> None:
    header = f"| {traces:,} traces, {os.cpu_count()} cores | seconds | traces a second | seconds of CPU |"
    lines = [header, "| --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        size = ["preset=3to4", f"preset.rows={2 * traces}", f"train_size={traces}", "test_size=1000"]
        seconds("data_prep", *size, f"out={folder}/data")
        for way, overrides in WAYS.items():
            rounds = [
                seconds("data_prep.traces", f"data={folder}/data", f"out={folder}/{len(way)}-{i}", *overrides)
                for i in range(ROUNDS)
            ]
            taken, cpu = (median(column) for column in zip(*rounds, strict=True))
            lines.append(f"| {way} | {taken:.1f} | {traces / taken:,.0f} | {cpu:.1f} |")
            print(lines[-1], rounds, flush=True, file=sys.stderr)
    table = "\n".join(lines) + "\n"
    (ROOT / "benchmarks" / "traces_speed.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 100_000)
