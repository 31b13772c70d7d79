"""python benchmarks/board.py: makes docs/board.md and docs/zh/board.md from the files in benchmarks/results/board.

Each file there is a `board.json` of `python -m verl_recipes.bench`, with the command of the training filled in by
hand (docs/bench.md). A test compares the pages. The baselines need no model: they follow from the number of solutions.

- A random guess is an expression drawn from all that there are on so many numbers; n of them are n responses.
- Exhaustive search tries all expressions, each once: in random order, or in the solver's order (fewest parentheses
  first, then fewest of * and /).
"""

import json
import math
from pathlib import Path
from typing import Any

from results import environment

from data_prep.solver import expressions
from data_prep.test_set import VERSION, read_problems
from verl_recipes.measure.intervals import figure

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "results" / "board"
PAGES = {"board.md.jinja": "docs/board.md", "board.zh.md.jinja": "docs/zh/board.md"}
TRIES = [10**i for i in range(7)]
N = 8  # responses a problem that a random guess is shown with


def random_order(problem: dict[str, Any], tries: int) -> float:
    """Chance that a solution is among the first `tries` of all expressions in random order (hypergeometric)."""
    total, solutions = expressions(problem["numbers"]), problem["solutions"]
    if tries > total - solutions:
        return 1.0
    return 1 - math.prod((total - tries - i) / (total - i) for i in range(solutions))


def guess(problems: list[dict[str, Any]]) -> dict[str, list[float]]:
    """mean@n and pass@n of n random guesses a problem, exactly."""
    chances = [problem["solutions"] / expressions(problem["numbers"]) for problem in problems]
    return {f"mean@{N}": figure(chances), f"pass@{N}": figure([1 - (1 - chance) ** N for chance in chances])}


def load() -> dict[str, dict[str, Any]]:
    """The rows by name, the best first."""
    rows = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROWS.glob("*.json"))}
    return dict(sorted(rows.items(), key=lambda item: -item[1]["figures"][f"mean@{item[1]['n']}"][0]))


def page(template: str) -> str:
    """One of the pages."""
    problems = read_problems()
    strata: dict[str, list[dict[str, Any]]] = {}
    for problem in problems:
        strata.setdefault(problem["stratum"], []).append(problem)
    orders = {
        "random": [figure([random_order(each, tries) for each in problems]) for tries in TRIES],
        "shortest": [figure([float(each["first"] <= tries) for each in problems]) for tries in TRIES],
    }
    return environment().get_template(template).render(
        rows=load(),
        version=VERSION,
        problems=len(problems),
        n=N,
        guess=guess(problems),
        strata={name: guess(some) for name, some in strata.items()},
        tries=TRIES,
        orders=orders,
    )  # fmt: skip


def main() -> None:
    for template, path in PAGES.items():
        (ROOT / path).write_text(page(template), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
