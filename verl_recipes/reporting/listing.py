"""Runs and their figures, one row a run, from the small files of each folder alone."""

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from verl_recipes.measure.problems import finite
from verl_recipes.reporting.charts import recipe_of
from verl_recipes.reporting.metrics import seconds_of
from verl_recipes.reporting.run import duration, read_settings, read_summary
from verl_recipes.run.best import mean_of_test
from verl_recipes.run.folder import RunFolder, mark_of, read_metrics

COLUMNS = ["run", "recipe", "seed", "state", "steps", "before", "after", "gain", "equations", "took", "last worked on"]
Row = dict[str, Any]


def runs_below(folder: Path) -> tuple[list[Path], list[str]]:
    """The folders of runs in a folder, at any depth but not within a run; and a line for each that is not readable."""
    found, unread = [], list[str]()
    for place, folders, files in os.walk(folder, onerror=lambda error: unread.append(where_and_why(error))):
        folders.sort()
        if Path(place) != folder and (mark := mark_of(Path(place))):
            folders.clear()
            if mark.get("kind") == "run" and {"config.yaml", "metrics.jsonl"} & {*files}:
                found.append(Path(place))
    return found, unread


def where_and_why(error: OSError) -> str:
    """The file or folder that could not be read, and why."""
    return f"{error.filename}: {error.strerror}"


def facts(path: Path) -> Row:
    """What is known of a run. Figures without a value are None.

    Returns:
        name, recipe, seed, state, done, planned; `before` and `after`: mean@n; `tried`: the equations of both;
        `seconds`; `time` of the last sign of work; `same`: equal for runs that differ by their seed alone; `unread`:
        what is wrong with config.yaml.
    """
    run = RunFolder(path)
    config, unread = read_settings(run)
    metrics, (summary, state, planned) = read_metrics(run), read_summary(run, config)
    given = [summary.get(side) for side in ("base", "trained")]
    sides = [side if isinstance(side, dict) else {} for side in given]
    # If a reward function returns a number, verl calls that `acc`; a dictionary has a `score` too.
    judged = {step: data for step, data in metrics.items() if any("/score/mean@" in name for name in data)}
    tests = {step: found for step, data in judged.items() if (found := mean_of_test(data, "/acc")) is not None}
    before, after = (next((finite(n) for key, n in side.items() if key.startswith("mean@")), None) for side in sides)
    times = [each.stat().st_mtime for each in (run.metrics, run.metrics_part, run.events, run.summary) if each.exists()]
    return {
        "name": path.name,
        "recipe": config.get("recipe_name"),
        "seed": config.get("seed"),
        "state": state,
        "done": max(metrics, default=0),
        "planned": planned,
        "before": tests.get(0) if before is None else before,
        "after": next((tests[step] for step in sorted(tests, reverse=True) if step), None) if after is None else after,
        "tried": [finite(side.get("candidates")) for side in sides],
        "seconds": seconds_of(summary),
        "time": max(times, default=None),
        "same": recipe_of(config) if config else str(path.resolve()),
        "unread": unread,
    }


def share(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{100 * value:{sign}.1f}"


def cells(each: Row) -> list[str]:
    """A row as text, by COLUMNS."""
    both = each["before"] is not None and each["after"] is not None
    tried = [f"{value:.1f}" for value in each["tried"] if value is not None]
    return [
        each["name"],
        str(each["recipe"] or ""),
        "" if each["seed"] is None else str(each["seed"]),
        each["state"],
        f"{each['done']} of {each['planned']}" if each["planned"] else str(each["done"]),
        share(each["before"]),
        share(each["after"]),
        share(each["after"] - each["before"], "+") if both else "",
        " to ".join(tried) if len(tried) == 2 else "",
        duration(each["seconds"]),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(each["time"])) if each["time"] else "",
    ]


def spread(values: Iterable[float | None], sign: str = "") -> str:
    """The mean of several runs with the least and the most."""
    known = [each for each in values if each is not None]
    return f"{share(fmean(known), sign)} ({share(min(known), sign)} to {share(max(known), sign)})" if known else ""


def counts(each: Row) -> bool:
    """Whether a run counts in the mean of its seeds. If it is not complete, its last test is of an earlier step."""
    return each["state"] == "complete" and each["before"] is not None and each["after"] is not None


def means(members: Sequence[Row]) -> list[str]:
    """The row of several seeds: their mean, with the least and the most. A seed that occurs twice counts once."""
    measured = [each for each in members if counts(each)]
    rows = list({each["seed"]: each for each in measured}.values())
    figures = [spread(each[key] for each in rows) for key in ("before", "after")]
    gain = spread((each["after"] - each["before"] for each in rows), "+")
    return [f"mean of {len(rows)} seeds", str(members[0]["recipe"] or ""), "", "", "", *figures, gain, "", "", ""]


def listing(folders: Sequence[Path]) -> dict[str, Any]:
    """`columns` and `rows` of runs as text, the mean below the seeds of one recipe; `unread`: lines on what is not."""
    groups: dict[str, list[Row]] = defaultdict(list)
    unread = []
    for folder in folders:
        try:
            each = facts(folder)
        except OSError as error:
            unread.append(where_and_why(error))
            continue
        groups[each["same"]].append(each)
        unread += [f"{folder}: {each['unread']}"] if each["unread"] else []
    rows = []
    for members in groups.values():
        seen = set[Any]()
        for each in members:
            twice = "; this seed once more" if each["seed"] is not None and each["seed"] in seen else ""
            seen.add(each["seed"])
            rows.append(cells(each | {"state": each["state"] + twice}))
        if len({each["seed"] for each in members if counts(each)}) > 1:
            rows.append(means(members))
    return {"columns": COLUMNS, "rows": rows, "unread": unread}
