"""The frozen test set (assets/bench): responses to its problems as a table, whatever made them.

    from reward_score import bench
    result = bench.measure(bench.judge_all({"v1-0000": ["3+4</think><answer>3+4</answer>", ...], ...}))
    print(*bench.table(result), sep="\\n")

Its 16 strata of 64 problems are described in assets/bench/README.md. A problem without a response counts as wrong.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from reward_score.figures import interval, pass_at_k, share_interval
from reward_score.grammar import REASONS, judge

_ROOT = Path(__file__).resolve().parent.parent
_SHIPPED = _ROOT / "data_prep" / "shipped"  # an installed package has the checkout's folders there
FOLDER = (_SHIPPED if _SHIPPED.is_dir() else _ROOT) / "assets" / "bench"
VERSION = "v1"
RIGHT = "right"


@cache
def problems(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The problems by id: `stratum`, `numbers`, `target` and what the solver says of them.

    Raises:
        ValueError: the file is not the one that SHA256SUMS records.
    """
    path, sums = folder / f"{VERSION}.json", folder / "SHA256SUMS"
    content = path.read_bytes()
    if f"{hashlib.sha256(content).hexdigest()}  {path.name}" not in sums.read_text(encoding="utf-8").splitlines():
        raise ValueError(f"{path} is not the file that {sums.name} beside it records; restore both")
    return {row["id"]: row for row in json.loads(content)["problems"]}


def unknown(name: object) -> str:
    """What is wrong with an id that the test set does not have."""
    return f"the test set {VERSION} has no problem {name!r}; its ids are {min(problems())} to {max(problems())}"


def judge_all(answers: Mapping[str, Sequence[str]], **options: bool) -> dict[str, list[str]]:
    """The verdict on each response, "right" or one of REASONS, by problem.

    Args:
        answers: the responses to each problem, by its id.
        options: of reward_score/grammar.py.

    Raises:
        ValueError: the test set has no such id.
    """
    known = problems()
    if strange := [name for name in answers if name not in known]:
        raise ValueError(unknown(strange[0]))
    return {
        name: [judge(each, known[name]["numbers"], known[name]["target"], **options).reason for each in some]
        for name, some in answers.items()
    }


def figures(verdicts: Sequence[Sequence[str]], n: int) -> dict[str, list[float]]:
    """`mean@n` and `pass@k` for k = 1, 2, 4, ... and n, each [value, low, high], from the verdicts on each problem."""
    right = [sum(each == RIGHT for each in some) for some in verdicts]
    values = {f"mean@{n}": [count / max(1, len(some)) for count, some in zip(right, verdicts, strict=True)]}
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        values[f"pass@{k}"] = [
            pass_at_k(len(some), count, k) if some else 0.0 for count, some in zip(right, verdicts, strict=True)
        ]
    return {name: [fmean(each), *share_interval(each)] for name, each in values.items()}


def measure(verdicts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The figures of verdicts on the test set, over all problems and by stratum.

    Args:
        verdicts: of `judge_all`. Problems that are missing, or have none, count as wrong.

    Returns:
        `version`; `n`, the least number of responses of a problem that has any; `problems`, `answered`, `responses`;
        `figures`, of all problems, and `strata`, of each stratum, as `figures()` gives them; `reasons`: the share of
        each verdict among all responses.

    Raises:
        ValueError: there is no response at all.
    """
    known = problems()
    given = [name for name in known if verdicts.get(name)]
    if not given:
        raise ValueError(f"there is no response to a problem of the test set {VERSION}")
    n = min(len(verdicts[name]) for name in given)
    strata: dict[str, list[Sequence[str]]] = {}
    for name, row in known.items():
        strata.setdefault(row["stratum"], []).append(verdicts.get(name, ()))
    every = [each for name in given for each in verdicts[name]]
    return {
        "version": VERSION,
        "n": n,
        "problems": len(known),
        "answered": len(given),
        "responses": len(every),
        "figures": figures([some for of_stratum in strata.values() for some in of_stratum], n),
        "strata": {name: figures(some, n) for name, some in strata.items()},
        "reasons": {reason: every.count(reason) / len(every) for reason in (RIGHT, *REASONS)},
    }


def table(result: Mapping[str, Any]) -> list[str]:
    """What `measure` returned as lines of text."""
    n, size = result["n"], result["problems"] // len(result["strata"])
    names = list(dict.fromkeys((f"mean@{n}", f"pass@{n}")))[: 1 + (n > 1)]
    width = max(map(len, result["strata"])) + 2
    lines = [f"test set {result['version']}: {result['problems']:,} problems, {result['responses']:,} responses"]
    if missing := result["problems"] - result["answered"]:
        lines.append(f"{missing:,} problems have no response and count as wrong")
    lines.append(f"{'':{width}}problems  " + "".join(f"{name:24}" for name in names).rstrip())
    for name, values, count in (
        ("all", result["figures"], result["problems"]),
        *((name, values, size) for name, values in result["strata"].items()),
    ):
        cells = (interval(values[each]) for each in names)
        lines.append(f"{name:{width}}{count:8,}  " + "".join(f"{cell:24}" for cell in cells).rstrip())
    wrong = (f"{reason} {share:.1%}" for reason, share in result["reasons"].items() if reason != RIGHT and share)
    return [*lines, "refused: " + (", ".join(wrong) or "none")]
