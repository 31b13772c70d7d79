"""python -m verl_recipes.runs [folder=runs]: the runs of a folder with their figures, one line a run.

Right answers before and after training are of 100 at the first try on the test problems (mean@n), and the gain is their
difference.

    python -m verl_recipes.runs
    python -m verl_recipes.runs folder=/data/runs

Seeds of one recipe have their mean below them, with the least and the most. Runs that go on, or were ended
early, are listed with what there is. Only the small files of a run are read; `python -m verl_recipes.report RUN RUN
out=both.html` draws the same runs on one page.
"""

import sys
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.cli import Checked, PathText, UserError, command
from verl_recipes.reporting.listing import listing, runs_below


class Keys(Checked):
    folder: PathText = Field(description="where to look for runs, at any depth")


@command("runs", Keys)
def main(cfg: Any) -> None:
    folder = Path(cfg.folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the one that holds runs with folder=")
    found, unread = runs_below(folder)
    if not found and not unread:
        raise UserError(f"{folder} holds no run; python -m verl_recipes.train makes one")
    listed = listing(found)
    used = [i for i, _ in enumerate(listed["columns"]) if any(row[i] for row in listed["rows"])]
    table = Table(*(listed["columns"][i] for i in used), box=None, pad_edge=False)
    for row in listed["rows"]:
        table.add_row(*(Text(row[i]) for i in used))
    Console(width=None if sys.stdout.isatty() else 1000).print(table)
    for line in [*unread, *listed["unread"]]:
        print(f"not read: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
