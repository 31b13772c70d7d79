"""The statistics of a data folder: counts, shares, distributions and leaks, as JSON, Markdown and a picture."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.prompts import number_texts
from data_prep.solver import Array
from data_prep.split import as_lists
from data_prep.steps import problem_hash

DIFFICULTY_STEP = 0.25
BINS = 25  # of a picture of many values


class Portrait:
    """The distribution of one set of problems. Only counts are kept.

    Args:
        measure: maps the texts of numbers and targets to the prompts' lengths in tokens; None leaves lengths out.
        keeps_duplicates: whether a problem may occur twice; then duplicates are counted.
    """

    def __init__(self, measure: Callable[..., Array] | None, keeps_duplicates: bool) -> None:
        self.measure = measure
        self.rows = self.solved = self.solvable = self.additive = self.fraction = 0
        self.counts, self.numbers, self.targets = (Counter[int]() for _ in range(3))
        self.solutions, self.difficulty, self.tokens = (Counter[int]() for _ in range(3))
        self.problems: list[Array] | None = [] if keeps_duplicates else None

    def add(self, rows: Array, solved: Array) -> None:
        """Count more rows (ROW and SOLVED of data_prep/steps.py)."""
        self.rows += len(rows)
        count(self.counts, rows["count"])
        count(self.numbers, rows["numbers"][rows["numbers"] > 0])
        count(self.targets, rows["target"])
        known = solved[solved["solutions"] >= 0]
        some = known[known["solutions"] > 0]
        self.solved += len(known)
        self.solvable += len(some)
        self.additive += int(some["additive"].sum())
        self.fraction += int(some["fraction"].sum())
        count(self.solutions, known["solutions"])
        count(self.difficulty, np.floor(some["difficulty"] / DIFFICULTY_STEP).astype(np.int64))
        if self.problems is not None:
            self.problems.append(problem_hash(rows))
        if self.measure and len(rows):
            lists = as_lists(rows["numbers"].astype(np.int64), rows["count"].astype(np.int64))
            count(self.tokens, self.measure(number_texts(lists), pa.array(rows["target"]).cast(pa.string())))

    def summary(self) -> dict[str, Any]:
        """All counts, for JSON. `solver` is null if nothing was solved, and `tokens` without a tokenizer."""
        solver = None
        if self.solved:
            solver = {
                "solvable_share": self.solvable / self.solved,
                "needs_product_share": share(self.solvable - self.additive, self.solvable),
                "needs_fraction_share": share(self.fraction, self.solvable),
                "solutions": dict(sorted(self.solutions.items())),
                "difficulty": {str(step * DIFFICULTY_STEP): n for step, n in sorted(self.difficulty.items())},
            }
        duplicates = None
        if self.problems is not None:
            duplicates = self.rows - len(np.unique(np.concatenate(self.problems))) if self.problems else 0
        return {
            "rows": self.rows,
            "duplicates_kept": duplicates,
            "numbers_in_a_problem": dict(sorted(self.counts.items())),
            "numbers": dict(sorted(self.numbers.items())),
            "targets": dict(sorted(self.targets.items())),
            "solver": solver,
            "tokens": dict(sorted(self.tokens.items())) or None,
        }


class Leaks:
    """How many test problems occur in training: their numbers alone, and numbers with target.

    All test sets must be added before the training rows.
    """

    def __init__(self) -> None:
        self.hashes: dict[str, list[tuple[Array, Array]]] = {}
        self.seen: dict[str, list[tuple[Array, Array, Array]]] = {}

    def test(self, name: str, rows: Array) -> None:
        self.hashes.setdefault(name, []).append((rows["hash"], problem_hash(rows)))

    def train(self, rows: Array) -> None:
        if not self.seen:
            for name, parts in self.hashes.items():
                columns = (np.concatenate(column) for column in zip(*parts, strict=True))
                unique = (np.unique(column, return_counts=True) for column in columns)
                self.seen[name] = [(values, counts, np.zeros(len(values), bool)) for values, counts in unique]
        for by_numbers, by_problem in self.seen.values():
            for (values, _, found), hashes in ((by_numbers, rows["hash"]), (by_problem, problem_hash(rows))):
                if len(values):
                    at = np.minimum(np.searchsorted(values, hashes), len(values) - 1)
                    found[at[values[at] == hashes]] = True

    def summary(self) -> dict[str, dict[str, int]]:
        """For each test set: rows, rows whose numbers are in training, rows whose numbers and target are."""
        return {
            name: {
                "rows": int(numbers[1].sum()),
                "numbers_in_training": int(numbers[1][numbers[2]].sum()),
                "problems_in_training": int(problems[1][problems[2]].sum()),
            }
            for name, (numbers, problems) in self.seen.items()
        }


def count(counter: Counter[int], values: Array) -> None:
    unique, counts = np.unique(values, return_counts=True)
    counter.update(dict(zip(unique.tolist(), counts.tolist(), strict=True)))


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---"] * len(header), *rows])


def span(histogram: dict[int, int]) -> str:
    return f"{min(histogram)}-{max(histogram)}" if histogram else "-"


def set_row(name: str, summary: dict[str, Any], limit: int | None) -> list[str]:
    """A set's row of the overview."""
    total, solver = summary["rows"], summary["solver"] or {}
    counts = ", ".join(f"{n}: {percent(k / total)}" for n, k in summary["numbers_in_a_problem"].items())
    tokens = summary["tokens"] or {}
    cells = [name, f"{total:,}", counts or "-", span(summary["numbers"]), span(summary["targets"])]
    cells += [percent(solver.get(key)) for key in ("solvable_share", "needs_product_share", "needs_fraction_share")]
    cells.append(span(tokens))
    cells.append(f"{sum(k for n, k in tokens.items() if n > limit):,}" if tokens and limit else "-")
    return cells


def solution_rows(sets: dict[str, Any]) -> list[list[str]]:
    """For each set a row with the share of problems by number of solutions."""
    edges = [0, 1, 2, 3, 6, 11, 101, 10**9]
    rows = []
    for name, summary in sets.items():
        if summary["solver"]:
            solutions = summary["solver"]["solutions"]
            total = sum(solutions.values())
            parts = [sum(k for n, k in solutions.items() if low <= n < high) for low, high in pairwise(edges)]
            rows.append([name, *(percent(part / total) for part in parts)])
    return rows


def edges_of(values: list[float], step: float) -> Array:
    """Edges of bins: one a value if there are few, else BINS of equal width, or of equal ratio over more than 1,000."""
    low, high = min(values), max(values)
    if (high - low) / step < 2 * BINS:
        return np.arange(low - step / 2, high + step, step)
    if low > 0 and high / low > 1000:
        return np.geomspace(low, high + 1, BINS + 1)
    return np.linspace(low - step / 2, high + step / 2, BINS + 1)


def draw(sets: dict[str, Any], path: Path) -> None:
    """Numbers, targets, solutions and difficulty of the sets, as a picture."""
    from matplotlib.figure import Figure

    solved = {name: summary["solver"] or {} for name, summary in sets.items()}
    panels = {
        "Given numbers": {name: summary["numbers"] for name, summary in sets.items()},
        "Targets": {name: summary["targets"] for name, summary in sets.items()},
        "Solutions of a problem (to 50)": {
            name: {n: k for n, k in solver.get("solutions", {}).items() if n <= 50} for name, solver in solved.items()
        },
        "Difficulty: blind tries until it is solved, as a power of ten": {
            name: {float(step): k for step, k in solver.get("difficulty", {}).items()}
            for name, solver in solved.items()
        },
    }
    figure = Figure(figsize=(10, 6))
    figure.subplots_adjust(0.06, 0.06, 0.98, 0.94, 0.14, 0.3)  # a layout engine would take longer than all the rest
    for axis, (title, histograms) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        values = [value for histogram in histograms.values() for value in histogram]
        edges = edges_of(values, DIFFICULTY_STEP if "Difficulty" in title else 1) if values else np.arange(2.0)
        for name, histogram in histograms.items():
            counts, _ = np.histogram(list(histogram), edges, weights=list(histogram.values()))
            if histogram:
                axis.stairs(100 * counts / counts.sum(), edges, label=name, linewidth=1.5)
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log" if values and np.ptp(np.diff(edges)) > 1 else "linear")
        axis.set_ylim(0)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in figure.axes[::2]:
        axis.set_ylabel("% of the set")
    figure.axes[1].legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def write(folder: Path, result: dict[str, Any], config: dict[str, Any], about: dict[str, Any]) -> None:
    """Write datasheet.json, datasheet.md and datasheet.png.

    Args:
        result: what `prepare` returned.
        about: what the manifest records of the source.
    """
    text = json.dumps({"source": about} | result, indent=1, ensure_ascii=False)
    (folder / "datasheet.json").write_text(text + "\n", encoding="utf-8")
    draw(result["sets"], folder / "datasheet.png")
    rows, sets, limit = result["rows"], result["sets"], config["max_prompt_length"]
    what = (
        about.get("repo") or about.get("preset", {}).get("name") or ", ".join(each["path"] for each in about["files"])
    )
    lines = [
        f"# Datasheet: {about['name']} {what}\n",
        f"Split `{config['split']['name']}`, prompt `{config['prompt']['name']}`, seed {config['seed']}. "
        "What the columns mean: docs/data.md of CountdownZero.\n",
    ]

    def add(title: str, header: list[str], cells: list[list[str]]) -> None:
        if cells:
            lines.append(f"## {title}\n\n{table(header, cells)}")

    add("Rows", list(rows), [[f"{n:,}" for n in rows.values()]])
    add("Rejected (rejected.jsonl)", ["why", "rows"], [[why, f"{n:,}"] for why, n in result["rejected"].items()])
    header = ["set", "rows", "how many numbers", "numbers", "targets", "solvable", "need * or /", "need a fraction"]
    header += ["tokens", f"over {limit} tokens" if limit else "over the limit"]
    add("Sets", header, [set_row(name, each, limit) for name, each in sets.items()])
    if kept := [f"{name} {each['duplicates_kept']:,}" for name, each in sets.items() if each["duplicates_kept"]]:
        lines.append(f"Rows that repeat an earlier problem, kept as the recipe keeps them: {', '.join(kept)}.\n")
    leaks = [[name, *(f"{n:,}" for n in leak.values())] for name, leak in result["leaks"].items()]
    add("Test problems that occur in training", ["set", "rows", "numbers in training", "problem in training"], leaks)
    add("Solutions", ["set", "0", "1", "2", "3-5", "6-10", "11-100", "over 100"], solution_rows(sets))
    lines.append("![Distributions of numbers, targets, solutions and difficulty](datasheet.png)\n")
    (folder / "datasheet.md").write_text("\n".join(lines), encoding="utf-8")
