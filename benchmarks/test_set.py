"""python benchmarks/test_set.py [check]: makes the frozen test set, assets/bench, or checks that it is the same.

16 strata of 64 problems, by rejection: problems of a preset are drawn (data_prep/generate.py), the solver says what
each is, and the first 64 that belong to the stratum stay. All numbers are on the test side of split=by_numbers, so that
no row of data/tiny changed when the set was made; no two problems have the same numbers. It writes v1.json, SHA256SUMS
and the datasheet README.md (from benchmarks/test_set.template.md). Three minutes of one core, nearly all for the solver
on six numbers.

`check` makes everything in memory and ends with an error if a byte differs.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from data_prep.cli import CONFIGS, compose
from data_prep.generate import generate
from data_prep.solver import forms, solve_many
from data_prep.split import TEST
from data_prep.test_set import SUMS, VERSION

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "bench"
SIZE, SEED = 64, 98
FIELD = {"name": "bench", "numbers": [1, 99], "tiles": False, "targets": [1, 100]}  # as configs/preset/3to4.yaml
FIELD |= {"integers": False, "max_intermediate": None, "must_use": []}


class Stratum(NamedTuple):
    """A preset whose problems are drawn, and which of them belong: a function of `tries`, `additive`, `fraction`."""

    preset: dict[str, Any]
    belongs: Callable[[dict[str, Any]], bool]
    what: str


def shipped(name: str) -> dict[str, Any]:
    """A preset of configs/preset."""
    found: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONFIGS / "preset" / f"{name}.yaml"))  # type: ignore[assignment]
    return found


def strata() -> dict[str, Stratum]:
    """The strata by name, in the order of the file."""
    made = {"tiny": Stratum(shipped("tiny"), lambda row: True, "as the tiny model's: `preset=tiny`")}
    for n in (3, 4, 5, 6):
        here = FIELD | {"count": [n], "integers": True}
        some = Stratum(here, lambda row: row["additive"], f"{n} numbers; + and - are enough")
        others = Stratum(here | {"must_use": ["*", "/"]}, lambda row: True, f"{n} numbers; * or / needed, no fraction")
        made |= {f"{n} numbers, + -": some, f"{n} numbers, * /": others}
    fraction = Stratum(FIELD | {"count": [4, 5]}, lambda row: row["fraction"], "4 or 5 numbers; a fraction needed")
    made |= {"fraction": fraction, "television": Stratum(shipped("tv"), lambda row: True, "`preset=tv`")}
    for decade, count in {1: [3], 2: [4], 3: [4, 5], 4: [5, 6], 5: [6]}.items():
        low, high = 10**decade, 10 ** (decade + 1)
        inside = lambda row, low=low, high=high: low <= row["tries"] < high  # noqa: E731
        what = f"{low:,} to {high:,} blind tries; {' or '.join(map(str, count))} numbers"
        made[f"{low:,} to {high:,} tries"] = Stratum(FIELD | {"count": count}, inside, what)
    return made


def drawn(preset: dict[str, Any], seed: int, share: float) -> Iterator[dict[str, Any]]:
    """Problems of the test side with what the solver says of them, without end."""
    block = 32 if max(preset["count"]) == 6 else 256
    for start in range(0, 10**6, block):
        numbers, count, target = generate(
            preset, np.arange(start, start + block), seed, side=TEST, held_out_share=share
        )
        solved = {n: solve_many(numbers[count == n, :n], target[count == n]) for n in np.unique(count).tolist()}
        for i, n in enumerate(count.tolist()):
            found, at = solved[n], int((count[:i] == n).sum())
            solutions = int(found.solutions[at])
            yield {
                "numbers": numbers[i, :n].tolist(),
                "target": int(target[i]),
                "solutions": solutions,
                "first": int(found.form[at]) + 1,
                "additive": bool(found.additive[at]),
                "fraction": bool(found.fraction[at]),
                "tries": len(forms(n).value) / solutions,
            }


def make() -> list[dict[str, Any]]:
    """All problems, in the order of the file."""
    share, seen, problems = compose("prepare", []).held_out_share, set(), []
    for place, (name, stratum) in enumerate(strata().items()):
        kept: list[dict[str, Any]] = []
        for row in drawn(stratum.preset, SEED + place, share):
            numbers = tuple(sorted(row["numbers"]))
            if stratum.belongs(row) and numbers not in seen:
                seen.add(numbers)
                kept.append(row)
            if len(kept) == SIZE:
                break
        kept.sort(key=lambda row: (len(row["numbers"]), sorted(row["numbers"])))
        problems += [{"stratum": name} | row for row in kept]
        print(f"{name}: {len(kept)}", file=sys.stderr, flush=True)
    return [
        {"id": f"{VERSION}-{i:04}"} | {k: v for k, v in row.items() if k != "tries"} for i, row in enumerate(problems)
    ]


def span(values: list[int]) -> str:
    return f"{min(values):,}-{max(values):,}"


def datasheet(problems: list[dict[str, Any]], sha256: str) -> str:
    """README.md of the folder."""
    rows = []
    for name, stratum in strata().items():
        some = [row for row in problems if row["stratum"] == name]
        tries = median(len(forms(len(row["numbers"])).value) / row["solutions"] for row in some)
        cells = [name, stratum.what, span([n for row in some for n in row["numbers"]])]
        cells += [span([row["target"] for row in some]), span([row["solutions"] for row in some]), f"{tries:,.0f}"]
        cells += [str(sum(row[key] for row in some)) for key in ("additive", "fraction")]
        rows.append(f"| {' | '.join(cells)} |")
    return (Path(__file__).with_name("test_set.template.md").read_text(encoding="utf-8")).format(
        version=VERSION, problems=f"{len(problems):,}", seed=SEED, size=SIZE, sha256=sha256, strata="\n".join(rows)
    )


def files() -> dict[str, str]:
    """The texts of the three files, by name."""
    problems = make()
    rows = ",\n".join(json.dumps(row) for row in problems)
    text = f'{{"version": "{VERSION}", "problems": [\n{rows}\n]}}\n'
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    sums = f"{sha256}  {VERSION}.json\n"
    return {f"{VERSION}.json": text, SUMS: sums, "README.md": datasheet(problems, sha256)}


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["check"]):  # a mistyped check would write the frozen files anew
        sys.exit(f"error: {' '.join(arguments)}: nothing or `check` is expected")
    for name, text in files().items():
        path = FOLDER / name
        if arguments == ["check"]:
            if path.read_text(encoding="utf-8") != text:
                sys.exit(f"error: {path} would be another file")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
