"""python benchmarks/reward_cost.py: milliseconds that one verdict takes on the most awkward responses of 16,384 tokens.

A token is taken as four characters. Each figure is the median of 21 calls; the table's last column is the ratio to the
same response at a quarter of the length, which must not pass 4 where the cost is linear.
"""

from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

from reward_score.countdown import compute_score

TRUTH = {"numbers": [11, 18, 25], "target": 175}
LENGTH = 4 * 16_384
RESPONSES = {
    "a long thought, a right answer": lambda n: (
        "11+18=29,29-25=4 no\n" * (n // 20) + "</think><answer>(18-11)*25</answer>"
    ),
    "answers without end": lambda n: "</think>" + "<answer>1</answer>" * (n // 18),
    "tags that never close": lambda n: "<answer>" * (n // 8),
    "thoughts opened and closed": lambda n: "<think></think>" * (n // 15),
    "angle brackets": lambda n: "<" * n,
    "deep parentheses": lambda n: "</think><answer>" + "(" * (n // 2) + "1" + ")" * (n // 2) + "</answer>",
    "one long number": lambda n: "</think><answer>" + "9" * n + "</answer>",
    "towers of powers": lambda n: "</think><answer>" + "9**" * (n // 3) + "9</answer>",
}


def milliseconds(response: str) -> float:
    times = []
    for _ in range(21):
        started = perf_counter()
        compute_score("countdown", response, TRUTH)
        times.append(1000 * (perf_counter() - started))
    return median(times)


def main() -> None:
    table = Table("response", "milliseconds", "times a quarter's")
    for name, make in RESPONSES.items():
        whole, quarter = milliseconds(make(LENGTH)), milliseconds(make(LENGTH // 4))
        table.add_row(name, f"{whole:.3f}", f"{whole / quarter:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
