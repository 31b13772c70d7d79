"""python -m verl_recipes.bench model=PATH [recipe=NAME]: measure a model on the frozen test set, for the board.

    runs/bench/tiny_seed0-tinyzero_base-seed0/
        board.json   model, recipe, commit, command, hardware, cost of the training, figures with intervals, all and by
                     stratum: a row of docs/board.md (docs/bench.md says how to add it)
        the rest     as an evaluation's (verl_recipes/run/evaluation.py)

    python -m verl_recipes.bench model=runs/tiny-seed0
    python -m verl_recipes.bench model=Qwen/Qwen2.5-3B-Instruct recipe=mini_r1 hardware=h100

The 1,024 problems of assets/bench are put under the prompt of `recipe=` or `prompt=`, or else of the model's run or
export. The samples come from verl's own validation; if the command is killed, the same command does what is missing.
Every response is judged by the same grammar, whatever reward trained the model, and `python -m reward_score --bench`
prints the same table for responses that anything made.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from data_prep.bench import write_bench
from data_prep.cli import CONFIGS, command, compose
from data_prep.solver import MAX_COUNT
from data_prep.split import hash_numbers, is_reserved, padded
from data_prep.test_set import VERSION, identity, read_problems
from reward_score import bench
from verl_recipes.measure.problems import numbers_and_target
from verl_recipes.planning.model import facts
from verl_recipes.reporting.run import Run, lookup
from verl_recipes.run.evaluation import SamplingKeys, evaluate, name_of
from verl_recipes.run.folder import RunFolder, mark_of, read_lines, write_json
from verl_recipes.run.start import say, typed
from verl_recipes.run.weights import find_prompt, find_weights, run_of, step_of

GOAL, STEPS = 0.6, 5  # the time to 60%: of the training steps before which the mean of five reached it


def prompt_of(cfg: DictConfig) -> dict[str, Any]:
    """The prompt of the recipe or the prompt that is named, or else of the model's export or run."""
    named = [each for each in cfg.overrides if each.partition("=")[0] in ("recipe", "prompt")]
    if not named:
        return find_prompt(None, Path(cfg.model), find_weights(Path(cfg.model)))
    model = "model=tiny" if "recipe=tiny" in named else "model=local"  # the tiny model's file sets its prompt
    return OmegaConf.to_container(compose("train", [model, *named]).prompt)  # type: ignore[return-value]


def seconds_to_goal(right: Mapping[int, float], seconds: Mapping[int, float]) -> float | None:
    """Seconds of the training steps up to the first whose accuracy, with that of the steps before, has a mean of GOAL.

    Args:
        right: the share of right responses in each step's batch.
        seconds: of each step.

    Returns:
        None if no STEPS steps in a row reach it.

    >>> seconds_to_goal({i: i / 10 for i in range(1, 11)}, {i: 2.0 for i in range(1, 11)})
    16.0
    """
    steps = sorted(right)
    for last in range(STEPS, len(steps) + 1):
        if fmean(right[step] for step in steps[last - STEPS : last]) >= GOAL:
            usual = fmean(seconds.values()) if seconds else 0.0  # of a step that was saved and not logged
            return sum(seconds.get(step, usual) for step in steps[:last])
    return None


def reserved_rows(files: Iterable[str]) -> int | None:
    """How many rows of training files have numbers of the test set: some may, if data_prep of today did not make them.

    None if no files are recorded, or one is gone.
    """
    paths = [Path(file) for file in files]
    if not paths or not all(path.is_file() for path in paths):
        return None
    rows = [row for path in paths for row in pq.read_table(path, columns=["reward_model"])["reward_model"].to_pylist()]
    problems = filter(None, (numbers_and_target(row) for row in rows))  # rows of other tasks have none
    lists = [numbers for numbers, _ in problems if len(numbers) <= MAX_COUNT]
    return int(is_reserved(hash_numbers(*padded(lists))).sum())


def training_of(model: Path) -> dict[str, Any] | None:
    """What the run that made the model was and cost, up to its step; None if it belongs to no run."""
    folder = run_of(model)
    if folder is None or not folder.config.exists():
        return None
    run = Run(folder.path, 0)
    until = step_of(model) or run.steps
    cost = run.cost(until=until)
    right = {step: value for step, value in run.curves.get("reward/acc", {}).items() if step <= until}
    gpu = facts("gpus").get(lookup(run.config, "card.name"), {})
    prices = gpu.get("price")
    return {
        "recipe": lookup(run.config, "recipe_name"),
        "base": lookup(run.config, "actor_rollout_ref.model.path"),
        "seed": lookup(run.config, "seed"),
        "git_commit": run.summary.get("git_commit"),
        "hardware": f"{cost['gpus']} x {gpu['name']}" if gpu else f"CPU, {cost['gpus']} ranks",
        "steps": until,
        "reserved_rows": reserved_rows(mark_of(folder.path).get("train_files", {})),
        "device_hours": cost["hours"],
        "price": [round(cost["hours"] * each, 2) for each in prices] + [gpu["currency"]] if prices else None,
        "seconds_to_60%": seconds_to_goal(right, run.curves.get("timing_s/step", {})),
    }


def row_of(cfg: DictConfig, prompt: dict[str, Any], out: RunFolder, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The content of board.json."""
    ids = [row["id"] for row in read_problems()]
    answers: dict[str, list[str]] = {}
    for row in read_lines(out.samples_of("validation", 0)):
        answers.setdefault(ids[row["extra_info"]["index"]], []).append(row["response"])
    return {
        "model": cfg.model,
        "weights": mark_of(out.path)["weights"],
        "prompt": prompt["name"],
        "test_set": identity(),
        "command": typed(),
        **{key: summary[key] for key in ("git_commit", "versions", "seed", "temperature", "cost")},
        "train_command": None,  # written by hand, in the board's copy
        "training": training_of(Path(cfg.model)),
        "figures_of_responses": {name: summary["figures"][name] for name in ("response_tokens", "truncated")},
        **bench.measure(bench.judge_all(answers)),
    }


@command("bench", SamplingKeys, CONFIGS / "commands", others="overrides")
def main(cfg: DictConfig) -> None:
    prompt = prompt_of(cfg)
    data = Path("data") / f"bench-{VERSION}-{re.sub(r'[^A-Za-z0-9_]+', '_', prompt['name'])}"
    if cfg.name is None:
        cfg.name = name_of(cfg.model, prompt["name"], cfg.seed)
    write_bench(prompt, data)
    console, out = Console(), RunFolder(cfg.out)
    cfg.data = str(data)
    summary = evaluate(cfg, out, console)
    row = row_of(cfg, prompt, out, summary)
    write_json(out.path / "board.json", row)
    print(*bench.table(row), sep="\n")
    if found := (row["training"] or {}).get("reserved_rows"):
        say(console, f"{found:,} training rows of this model have numbers of the test set: it is no row for the board")
    say(console, f"{out.path}: board.json summary.json samples/ log.txt")


if __name__ == "__main__":
    main()
