"""python -m verl_recipes.plan recipe=... model=... hardware=... [overrides]: what a run needs, before it costs money.

    the memory of each phase of a step on each GPU, by what holds it; if it does not fit, which setting to change
    vLLM's KV cache, and how many sequences it holds at once
    the seconds of each part of a step; hours, GPU-hours and price of the whole run

plan.sweep=true prints a row for each card and number of cards instead. The exit status is 1 if the run does not fit,
unless force=true. Nothing is started and no weights are fetched; a GPU is not needed.

    python -m verl_recipes.plan recipe=mini_r1 model=qwen2.5_3b_instruct hardware=h100 gpus=4
    python -m verl_recipes.plan recipe=tinyzero_grpo model=qwen2.5_1.5b plan.sweep=true       which card, how many
"""

import logging
import sys
from typing import Any

from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from data_prep.cli import UserError, command, compose, split_options
from verl_recipes.planning import time as plan_time
from verl_recipes.planning.estimate import estimate, gpu_of
from verl_recipes.planning.memory import GIB, phases
from verl_recipes.planning.model import facts
from verl_recipes.run.model import check_same_model
from verl_recipes.settings.configuration import check_ranks, gpus_of, longest
from verl_recipes.settings.schema import TrainKeys

SIZES = ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2))  # of a sweep: gpus of each machine, and nodes
COLUMNS = (
    *("card", "gpus", "nodes", "fits", "tightest phase", "GiB"),
    *("sequences at once", "s a step", "hours", "GPU-hours", "price"),
)


def price_text(price: list[str] | None) -> str:
    """'330-420 yuan', '330 yuan', or '-'."""
    if price is None:
        return "-"
    low, high, currency = price
    return f"{low} {currency}" if low == high else f"{low}-{high} {currency}"


def memory_table(memory: dict[str, dict[str, float]], limit: float | None) -> Table:
    """GiB of each phase, by what holds them."""
    digits = 1 if limit else 3
    table = Table("", *memory, title="GiB on each GPU" if limit else "GiB in the process of each rank")
    for name in dict.fromkeys(name for parts in memory.values() for name in parts):
        held = [parts.get(name, 0.0) / GIB for parts in memory.values()]
        table.add_row(name, *(f"{each:.{digits}f}" if each else "" for each in held))
    table.add_section()
    sums = [sum(parts.values()) / GIB for parts in memory.values()]
    table.add_row("sum", *(f"{each:.{digits}f}{' too much' if limit and each > limit else ''}" for each in sums))
    return table


def published_table() -> Table:
    """The time model compared with published runs."""
    table = Table("published run", "seconds a step", "by this model", "error", title="the same model of time elsewhere")
    for name, said, computed in plan_time.published():
        if said is None:
            table.add_row(name, "not published", f"{computed:.0f}", "")
        else:
            low, high = said
            text = f"{low}" if low == high else f"{low}-{high}"
            table.add_row(name, text, f"{computed:.0f}", f"{2 * computed / (low + high) - 1:+.0%}")
    return table


def show(cfg: DictConfig, console: Console) -> list[str]:
    """Print the whole plan of a run; returns what does not fit."""
    if gpu_of(cfg) is None:
        console.print(
            memory_table(phases(cfg, None), None),
            "No GPU: this is what training holds, beside about 1 GiB of Python and libraries in each of a dozen "
            "processes and vLLM's own; benchmarks/plan_memory.py compares it with a measurement. Time is not planned "
            "on a CPU.",
        )
        return []
    found = estimate(cfg)
    gpu, cache, hours = found["gpu"], found["cache"], found["hours"]
    train, alone = gpus_of(cfg)
    console.print(memory_table(found["memory"], gpu["memory_gib"]))
    console.print(
        f"{train} x {gpu['name']}" + (f", and {alone} that only generate" if alone else "") + f", {gpu['memory_gib']} "
        f"GiB each. vLLM's KV cache: {cache['kv_cache'] / GIB:.1f} GiB, {cache['sequences']:.0f} sequences of "
        f"{longest(cfg)} tokens at once."
    )
    table = Table("part", "seconds", title="a step, by assumption (configs/facts/assumptions.yaml)")
    for part, value in found["seconds"].items():
        table.add_row(part, f"{value:.0f}")
    console.print(table)
    mean = found["work"].mean_response
    console.print(f"Mean response: {mean:.0f} tokens (plan.response_tokens= for another).")
    steps, parts = cfg.trainer.total_training_steps, ", ".join(f"{part} {n:.1f}" for part, n in hours.items())
    console.print(
        f"{steps} steps: {sum(hours.values()):.1f} hours ({parts}), {found['gpu_hours']:.0f} "
        f"GPU-hours, {price_text(found['price'])}" + ("" if found["price"] else " (plan.price=, of a GPU-hour)")
    )
    console.print(published_table())
    return found["problems"]


def sweep_row(found: dict[str, Any]) -> list[str]:
    """What a sweep shows of one estimate."""
    phase, parts = max(found["memory"].items(), key=lambda item: sum(item[1].values()))
    return [
        "no" if found["problems"] else "yes",
        phase,
        f"{sum(parts.values()) / GIB:.0f} of {found['gpu']['memory_gib']:.0f}",
        f"{found['cache']['sequences']:.0f}",
        f"{found['seconds']['step']:.0f}",
        f"{sum(found['hours'].values()):.1f}",
        f"{found['gpu_hours']:.0f}",
        price_text(found["price"]),
    ]


def sweep(overrides: list[str], console: Console) -> Table:
    """A row for each card of configs/facts/gpus.yaml in each of SIZES."""
    table = Table(*COLUMNS, box=box.MARKDOWN)
    for card in facts("gpus"):
        for gpus, nodes in SIZES:
            cfg = compose("train", [*overrides, f"hardware={card}", f"gpus={gpus}", f"nodes={nodes}"], TrainKeys)
            row = [card, str(gpus), str(nodes)]
            try:
                check_ranks(cfg)
            except UserError:
                table.add_row(*row, "no", *["-"] * 7)
                continue
            with console.status(f"{gpus * nodes} x {card} ..."):
                table.add_row(*row, *sweep_row(estimate(cfg)))
    return table


@command("train", TrainKeys)
def main(cfg: DictConfig) -> None:
    logging.getLogger("torch").setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if cfg.plan.sweep:
        given, *_ = split_options(sys.argv[1:])
        overrides = [each for each in given if not each.startswith(("hardware=", "gpus=", "nodes="))]
        console.print(sweep(overrides, console))
        return
    check_same_model(cfg)
    with console.status("torch's memory tracker, half a minute the first time ..."):
        problems = show(cfg, console)
    if problems:
        text = "; ".join(problems)
        if not cfg.force:
            raise UserError(f"this run does not fit. {text}. force=true starts it all the same")
        console.print(f"warning: this run does not fit. {text}", highlight=False, markup=False)
    else:
        console.print(f"{cfg.name}: fits" if gpu_of(cfg) else f"{cfg.name}: on a CPU", markup=False)


if __name__ == "__main__":
    main()
