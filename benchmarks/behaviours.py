"""python benchmarks/behaviours.py: how often the rules of verl_recipes/measure/behaviours.py are right.

Compares them with the labels of tests/behaviour_traces.jsonl. These are thoughts in English and Chinese, most of them
written to mislead the rules, and labelled by the definitions before there was a rule. The rules were made on the part
`tuning`; the part `held_out` was used for the figures alone. Writes the table of benchmarks/behaviours.md, which
docs/behaviours.md and docs/zh/behaviours.md repeat. With -v, prints each trace of the part
`tuning` that a rule gets wrong.
"""

import json
import sys
from pathlib import Path
from typing import Any

from verl_recipes.measure.behaviours import BEHAVIOURS, behaviours

ROOT = Path(__file__).resolve().parent.parent


def table(traces: list[dict[str, Any]]) -> str:
    """A row for each behaviour, part and language; `shown` is the number of traces labelled with it."""
    lines = ["| behaviour | traces | shown | found | precision | recall |", "| --- | --- | --- | --- | --- | --- |"]
    parts = {
        "tuning": [trace for trace in traces if trace["part"] == "tuning"],
        "held out": (held_out := [trace for trace in traces if trace["part"] == "held_out"]),
        "held out, English": [trace for trace in held_out if trace["language"] == "en"],
        "held out, Chinese": [trace for trace in held_out if trace["language"] == "zh"],
    }
    for name in BEHAVIOURS:
        for part, chosen in parts.items():
            shown = [name in trace["shows"] for trace in chosen]
            found = [behaviours(trace["text"], trace["numbers"], trace["target"])[name] > 0 for trace in chosen]
            both = sum(a and b for a, b in zip(shown, found, strict=True))
            precision, recall = both / max(sum(found), 1), both / max(sum(shown), 1)
            cells = (f"`{name}`", f"{len(chosen)} {part}", sum(shown), sum(found), f"{precision:.2f}", f"{recall:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    lines = (ROOT / "tests" / "behaviour_traces.jsonl").read_text(encoding="utf-8").splitlines()
    traces = [json.loads(line) for line in lines]
    if "-v" in sys.argv:
        for trace in (each for each in traces if each["part"] == "tuning"):
            counts = behaviours(trace["text"], trace["numbers"], trace["target"])
            for name in BEHAVIOURS:
                if (counts[name] > 0) != (name in trace["shows"]):
                    print(
                        "missed " if name in trace["shows"] else "invented", name, json.dumps(trace, ensure_ascii=False)
                    )
        return
    (ROOT / "benchmarks" / "behaviours.md").write_text(table(traces), encoding="utf-8")
    print(table(traces))


if __name__ == "__main__":
    main()
