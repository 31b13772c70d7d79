"""python -m verl_recipes.evaluate model=PATH data=FOLDER n=8: sample a model and measure it, with intervals.

    runs/evaluations/tiny_seed0-tiny-seed0/
        run.json           what is measured: model, data, sampling
        summary.json       the figures (verl_recipes/measure/evaluation.py), overall and by kinds of problem
        samples/           validation/0.jsonl: n responses to each problem; greedy/0.jsonl: one at temperature 0
        verl.yaml, log.txt, metrics.jsonl as in a run's folder

    python -m verl_recipes.evaluate model=runs/tiny-seed0
    python -m verl_recipes.evaluate model=models/qwen2.5_0.5b data=data/mini_r1 n=4 hardware=h100

The samples come from verl's own validation, with the rollout engine, the hardware and the rules of training, so a
number from here means the same as one from a run's summary.json. Every row that verl gets has its own seed, so the same
model, data and seed give the same responses. If the command is killed, the same command does what is missing.

The prompt comes from the data's manifest, and the lengths from the model's run or its generation_config.json. All keys
and groups of training can be added: `prompt=mini_r1`, `data.max_response_length=512`.

    python -m verl_recipes.evaluate compare A B

compares two evaluations, or files of samples, on the same problems.
"""

import sys
from pathlib import Path
from typing import Annotated

from omegaconf import DictConfig
from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text as Plain

from data_prep.cli import CONFIGS, PathText, UserError, command
from reward_score.figures import interval
from verl_recipes.measure.comparison import compare
from verl_recipes.measure.problems import set_name
from verl_recipes.run.evaluation import Row, SamplingKeys, evaluate, name_of
from verl_recipes.run.folder import RunFolder, last_samples, read_object
from verl_recipes.run.start import say


class Keys(SamplingKeys):
    data: Annotated[list[PathText], Field(min_length=1)] | PathText = Field(
        description="a folder of data_prep (test.parquet, ood_*.parquet), or parquet files"
    )


def show(summary: Row, out: RunFolder, console: Console) -> None:
    """Two tables: the figures, and the main ones by kinds of problem."""
    table = Table("figure", "95% interval", title=Plain(f"{summary['model']}: {summary['problems']} problems"))
    for name, value in summary["figures"].items():
        table.add_row(name, interval(value))
    for reason, value in summary["reasons"].items():
        if reason != "right" and value[0]:
            table.add_row(f"refused: {reason}", interval(value))
    main = [f"mean@{summary['n']}", f"pass@{summary['n']}", "greedy"] if summary["n"] else ["score"]
    kinds = Table("kind", "problems", *main)
    for name, values in summary["by"].items():
        for value, figures in values.items():
            cells = (interval(figures[key]) if key in figures else "" for key in main)
            kinds.add_row(Plain(f"{name}: {value}"), str(figures["problems"]), *cells)
    console.print(table, kinds, sep="\n")
    for each in summary.get("missing", []):
        say(console, each)
    say(console, f"{out.path}: summary.json samples/ log.txt")


def show_comparison(first: Path, second: Path, console: Console) -> None:
    """The paired test, a row for each test set."""
    rows = [last_samples(path) for path in (first, second)]
    for path, samples in zip((first, second), rows, strict=True):
        if not samples:
            raise UserError(f"{path} holds no samples")
    drawn = [read_object(RunFolder(path).summary).get("temperature") for path in (first, second)]
    a, b = ("" if each is None else f" (temperature {each:g})" for each in drawn)
    title = Plain(f"A: {first}{a}\nB: {second}{b}")
    table = Table("set", "problems", "A", "B", "B - A", "B better, worse", "p", title=title)
    for name in dict.fromkeys(set_name(row) for each in rows for row in each):
        one, other = ([row for row in each if set_name(row) == name] for each in rows)
        if not (one and other):
            raise UserError(f"the set {name} is only in {first if one else second}: evaluate both on the same data")
        result = compare(one, other)
        figures = (interval(result[key]) for key in ("first", "second", "difference"))
        p = f"{result['p']:.4f}" if result["p"] > 0.001 else "< 0.001"
        table.add_row(Plain(name), str(result["problems"]), *figures, f"{result['better']}, {result['worse']}", p)
    console.print(table, "mean of the samples of each problem; paired permutation test, two-sided", sep="\n")


@command("evaluate", Keys, CONFIGS / "commands", others="overrides")
def main(cfg: DictConfig) -> None:
    if cfg.name is None:
        cfg.name = name_of(cfg.model, Path(cfg.data).stem if isinstance(cfg.data, str) else "files", cfg.seed)
    console, out = Console(), RunFolder(cfg.out)
    show(evaluate(cfg, out, console), out, console)


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        if len(sys.argv) != 4:
            raise UserError("two evaluations are expected: python -m verl_recipes.evaluate compare A B")
        show_comparison(Path(sys.argv[2]), Path(sys.argv[3]), Console())
    else:
        main()
