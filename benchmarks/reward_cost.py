"""python benchmarks/reward_cost.py [RUN]: what a verdict costs.

1. Responses a second, compared with TinyZero's scorer (two regular expressions and an eval), on the same responses of
   about 1,500 characters, in turns in one process.
2. Milliseconds for hostile responses of 16,384 tokens (at four characters a token) and of a million characters, the
   latter also with all components. The last column divides the cost of a character of the longest response by that of a
   thousand characters: it is about 1 if the cost is linear.
3. The time of an import in a new interpreter.
4. For a run's folder: the reward's share of its steps.

Each figure is a median: of 21 rounds for 1, of 11 calls for 2, of 11 processes for 3, and of all steps but the first
for 4.
"""

import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

from reward_score.countdown import COMPONENTS, compute_score
from verl_recipes.run.folder import read_lines

TRUTH = {"numbers": [11, 18, 25], "target": 175}
ALL = dict.fromkeys(COMPONENTS, 0.0)
RIGHT = "</think><answer>(18-11)*25</answer>"


def block(inside: str) -> str:
    return f"</think><answer>{inside}</answer>"


HOSTILE: dict[str, Callable[[int], str]] = {  # of about n characters; tests/test_reward.py uses them too
    "a long thought, a right answer": lambda n: "11+18=29,29-25=4 no\n" * (n // 20) + RIGHT,
    "a power tower": lambda n: block("9**" * (n // 3) + "9"),
    "a number of all digits": lambda n: block("9" * n),
    "open parentheses": lambda n: block("(" * n),
    "nested parentheses": lambda n: block("(" * (n // 2) + "1" + ")" * (n // 2)),
    "minus signs": lambda n: block("-" * n + "1"),
    "unclosed thoughts": lambda n: "<think>" * (n // 7),
    "unclosed answers": lambda n: "</think>" + "<answer>" * (n // 8),
    "answers without end": lambda n: "</think>" + "<answer>1</answer>" * (n // 18),
    "nested answers": lambda n: "</think>" + "<answer>" * (n // 17) + "1" + "</answer>" * (n // 17),
    "thoughts opened and closed": lambda n: "<think></think>" * (n // 15),
    "closing tags": lambda n: "</think></answer>" * (n // 17),
    "angle brackets": lambda n: "</think>" + "<" * n,
    "beginnings of tags": lambda n: "</think>" + "</answe" * (n // 7),
    "null bytes": lambda n: block("\0" * n),
    "surrogates": lambda n: block("\ud800" * n),
    "look-alike digits": lambda n: block("１" * n) + block("٣" * 900),
    "white space": lambda n: block(" " * n) + block(" " * 1000),
    "a thousand signs, many times": lambda n: block("(-" * 500) * (n // 1023),
    "two languages in turns": lambda n: "a中" * (n // 2) + RIGHT.replace("5", "6"),
    "random characters": lambda n: "".join(map(chr, random.Random(0).choices(range(0x4E00, 0x9FFF), k=n))),
}


def tinyzero(response: str) -> float:
    """Jiayi-Pan/TinyZero, verl/utils/reward_score/countdown.py, as it is but for the prompt that it cuts off."""
    matches = list(re.finditer(r"<answer>(.*?)</answer>", response.split("\n")[-1]))
    if not matches:
        return 0.0
    equation = matches[-1].group(1).strip()
    if sorted(int(n) for n in re.findall(r"\d+", equation)) != sorted(TRUTH["numbers"]):  # type: ignore[call-overload]
        return 0.1
    try:
        if not re.match(r"^[\d+\-*/().\s]+$", equation):
            return 0.1
        value = eval(equation, {"__builtins__": None}, {})
        return 1.0 if abs(value - TRUTH["target"]) < 1e-5 else 0.1
    except Exception:
        return 0.1


def ordinary(count: int = 200) -> list[str]:
    """Responses of about 1,500 characters as a model writes them: half of the answers right."""
    rng = random.Random(0)
    responses = []
    for i in range(count):
        lines = []
        while sum(map(len, lines)) < 1450:
            a, b, c = rng.choices(range(1, 26), k=3)
            lines.append(f"Let me try {a} * {b} = {a * b}, then {a * b} - {c} = {a * b - c}, which is not 175.\n")
        answer = "(18 - 11) * 25" if i % 2 else rng.choice(["18 + 11 * 25", "25 * 18", "(25 - 18) / 11", "175", "none"])
        responses.append("".join(lines) + f"</think>\n<answer> {answer} </answer>")
    return responses


def seconds(function: Callable[[], object]) -> float:
    started = perf_counter()
    function()
    return perf_counter() - started


def rates(console: Console) -> None:
    responses = ordinary()
    assert all(tinyzero(r) in (1.0, 0.1) for r in responses)
    scorers: dict[str, Callable[[str], object]] = {
        "ours": lambda r: compute_score("countdown", r, TRUTH),
        "ours, all components": lambda r: compute_score("countdown", r, TRUTH, weights=ALL),
        "TinyZero's": tinyzero,
    }
    times: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(21):
        for name, scorer in scorers.items():
            times[name].append(seconds(lambda scorer=scorer: [scorer(r) for r in responses]))  # type: ignore[misc]
    table = Table("scorer", "responses a second", "times TinyZero's", title="responses of 1,500 characters, one core")
    for name, spent in times.items():
        ratio = median(theirs / ours for theirs, ours in zip(times["TinyZero's"], spent, strict=True))
        table.add_row(name, f"{len(responses) / median(spent):,.0f}", f"{ratio:.2f}")
    console.print(table)


def hostile(console: Console) -> None:
    table = Table("response", "65,536 (ms)", "1,000,000 (ms)", "1,000,000, all components", "a character, over 1,000's")
    for name, make in HOSTILE.items():
        spent = []
        for length in (1000, 65_536, 1_000_000):
            response = make(length)
            repeats = max(1, 20_000 // length)
            call = lambda r=response, n=repeats: [compute_score("countdown", r, TRUTH) for _ in range(n)]  # noqa: E731
            spent.append(median(seconds(call) / repeats for _ in range(11)))
        everything = median(seconds(lambda r=response: compute_score("", r, TRUTH, weights=ALL)) for _ in range(11))  # type: ignore[misc]
        cells = f"{1000 * spent[1]:.2f}", f"{1000 * spent[2]:.1f}", f"{1000 * everything:.1f}"
        table.add_row(name, *cells, f"{spent[2] / spent[0] / 1000:.2f}")
    console.print(table)


def imports(console: Console) -> None:
    script = "from time import perf_counter as now; t = now(); import reward_score.countdown; print(now() - t)"
    spent = [float(subprocess.check_output([sys.executable, "-S", "-c", script])) for _ in range(11)]
    console.print(f"import reward_score.countdown: {1000 * median(spent):.0f} ms")


def share(run: Path, console: Console) -> None:
    lines = read_lines(run / "metrics.jsonl")
    steps = {line["step"]: line["data"]["timing_s/step"] for line in lines if "timing_s/step" in line["data"]}
    shares = []
    for step, spent in sorted(steps.items())[1:]:
        rows = read_lines(run / "samples" / "train" / f"{step}.jsonl")
        cost = seconds(lambda rows=rows: [compute_score("", r["response"], r["ground_truth"]) for r in rows])  # type: ignore[misc]
        shares.append((cost / spent, len(rows), spent))
    portion, count, spent = (median(column) for column in zip(*shares, strict=True))
    console.print(f"{run}: {portion:.2%} of a step ({count:.0f} responses, {spent:.1f} s)")


def main() -> None:
    console = Console()
    rates(console)
    hostile(console)
    imports(console)
    for run in sys.argv[1:]:
        share(Path(run), console)


if __name__ == "__main__":
    main()
