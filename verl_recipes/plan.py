"""python -m verl_recipes.plan recipe=... model=... hardware=... [overrides]: what a run needs, before it costs.

    memory of each phase of a step on each GPU, by what holds it; whether it fits, and which setting to turn if not
    KV cache of vLLM, and how many sequences it holds at once
    seconds a step by part, hours, GPU-hours and price of the whole run

plan.sweep=true prints one row for each option of `hardware` instead. The exit status is 1 where the run does not fit,
unless force=true. Nothing is started and nothing fetched; a GPU is not needed.
"""

import logging
import sys
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from data_prep.cli import CONFIGS, UserError, command
from verl_recipes.planning import time as plan_time
from verl_recipes.planning.memory import GIB, facts, passes, phases, vllm
from verl_recipes.settings.configuration import check_choice, check_ranks, gpus_of, longest
from verl_recipes.settings.schema import TrainKeys

OFFLOAD = "actor_rollout_ref.actor.fsdp_config.{param_offload,optimizer_offload}=true"


def gpu_of(cfg: DictConfig) -> dict[str, Any] | None:
    """Facts of the run's GPU; None for a CPU."""
    name = cfg.card.name.lower()
    if cfg.trainer.device == "cpu":
        return None
    if name not in facts("gpus"):
        raise UserError(f"card.name={name}: configs/facts/gpus.yaml knows {', '.join(facts('gpus'))}")
    return facts("gpus")[name]


def advice(cfg: DictConfig, phase: str) -> str:
    """The settings that make a phase smaller and are not turned yet, the cheapest first."""
    models = cfg.actor_rollout_ref
    actor, rollout, model = models.actor, models.rollout, models.model
    engine = actor.fsdp_config
    turns: list[tuple[bool, str]] = []
    if phase in ("generate", "weights to vllm"):
        utilisation = rollout.gpu_memory_utilization
        turns += [
            (not (engine.param_offload and engine.optimizer_offload), OFFLOAD),
            (utilisation > 0.3, f"actor_rollout_ref.rollout.gpu_memory_utilization below {utilisation}"),
            (True, "actor_rollout_ref.rollout.tensor_model_parallel_size higher"),
        ]
    else:
        key = "ppo_max_token_len_per_gpu" if actor.use_dynamic_bsz else "ppo_micro_batch_size_per_gpu"
        now = actor[key] or 0
        least = longest(cfg) if actor.use_dynamic_bsz else 1
        other = "critic.fsdp" if phase == "update actor" else "actor_rollout_ref.actor.fsdp_config"
        turns += [
            (not model.enable_gradient_checkpointing, "actor_rollout_ref.model.enable_gradient_checkpointing=true"),
            (now > least, f"actor_rollout_ref.actor.{key} below {now}, down to {least}"),
            ("critic" in passes(cfg), f"{other}.{{param_offload,optimizer_offload}}=true"),
            (not engine.offload_policy, "actor_rollout_ref.actor.fsdp_config.offload_policy=true (slower)"),
            (not model.lora_rank, "actor_rollout_ref.model.lora_rank=32"),
        ]
    return "; ".join([text for useful, text in turns if useful] + ["more GPUs, or a smaller model"])


def judge(cfg: DictConfig, memory: dict[str, dict[str, float]], gpu: dict[str, Any]) -> list[str]:
    """One line for each thing that does not fit."""
    lines = []
    try:
        check_choice(cfg)
    except UserError as error:
        lines.append(str(error).removeprefix("error: "))
    for phase, parts in memory.items():
        need = sum(parts.values()) / GIB
        if need > gpu["memory_gib"]:
            lines.append(f"{phase}: {need:.1f} GiB of {gpu['memory_gib']}; turn: {advice(cfg, phase)}")
    held = vllm(cfg, gpu["memory_gib"] * GIB)["sequences"]
    if held < 1:
        lines.append(
            f"generate: the KV cache does not hold one sequence of {longest(cfg)} tokens; turn: "
            "actor_rollout_ref.rollout.gpu_memory_utilization or tensor_model_parallel_size higher"
        )
    return lines


def price_of(cfg: DictConfig, gpu: dict[str, Any]) -> tuple[list[float], str] | None:
    """[low, high] of a GPU-hour and the currency: the configuration's, else the GPU's; None where neither says."""
    price = cfg.plan.price
    if price is None:
        return (gpu["price"], gpu["currency"]) if gpu["price"] else None
    return ([price] * 2 if isinstance(price, int | float) else list(price)), cfg.plan.currency


def estimate(cfg: DictConfig) -> dict[str, Any]:
    """Everything that plan says of a run on GPUs."""
    gpu = gpu_of(cfg)
    assert gpu is not None
    check_ranks(cfg)
    memory = phases(cfg, gpu["memory_gib"] * GIB)
    cache = vllm(cfg, gpu["memory_gib"] * GIB)
    work = plan_time.work_of(cfg, memory, cache["sequences"])
    seconds = plan_time.seconds(work, gpu)
    hours = plan_time.hours(cfg, work, gpu, seconds["step"])
    gpu_hours = sum(hours.values()) * sum(gpus_of(cfg))
    price = price_of(cfg, gpu)
    return {
        "gpu": gpu,
        "memory": memory,
        "cache": cache,
        "work": work,
        "seconds": seconds,
        "hours": hours,
        "gpu_hours": gpu_hours,
        "price": [f"{gpu_hours * each:.0f}" for each in price[0]] + [price[1]] if price and hours else None,
        "problems": judge(cfg, memory, gpu),
    }


def price_text(price: list[str] | None) -> str:
    """'330-420 yuan', '330 yuan', or '-'."""
    if price is None:
        return "-"
    low, high, currency = price
    return f"{low} {currency}" if low == high else f"{low}-{high} {currency}"


def memory_table(memory: dict[str, dict[str, float]], limit: float | None) -> Table:
    """GiB by holder and phase."""
    digits = 1 if limit else 3
    table = Table("", *memory, title="GiB on each GPU" if limit else "GiB in the process of each rank")
    for name in dict.fromkeys(name for parts in memory.values() for name in parts):
        held = [parts.get(name, 0.0) / GIB for parts in memory.values()]
        table.add_row(name, *(f"{each:.{digits}f}" if each else "" for each in held))
    table.add_section()
    sums = [sum(parts.values()) / GIB for parts in memory.values()]
    table.add_row("sum", *(f"{each:.{digits}f}{' too much' if limit and each > limit else ''}" for each in sums))
    return table


def show(cfg: DictConfig, console: Console) -> list[str]:
    """Print everything of one run; returns what does not fit."""
    if gpu_of(cfg) is None:
        console.print(
            memory_table(phases(cfg, None), None),
            "No GPU: what training holds, beside about 1 GiB of Python and libraries in each of a dozen processes and "
            "vLLM's own; benchmarks/plan_memory.py sets it beside what was measured. Time is not planned on a CPU.",
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
    if hours:
        steps = plan_time.steps_of(cfg)
        parts = ", ".join(f"{part} {value:.1f}" for part, value in hours.items())
        console.print(
            f"{steps} steps: {sum(hours.values()):.1f} hours ({parts}), {found['gpu_hours']:.0f} GPU-hours, "
            f"{price_text(found['price'])}" + ("" if found["price"] else " (plan.price=, of a GPU-hour)")
        )
    else:
        console.print("Hours: the number of steps follows from the data, which is not there yet (python -m data_prep).")
    table = Table("published run", "seconds a step", "by this model", "error", title="the same model of time elsewhere")
    for name, said, computed in plan_time.published():
        if said is None:
            table.add_row(name, "not published", f"{computed:.0f}", "")
        else:
            middle = sum(said) / 2
            low, high = said
            text = f"{low}" if low == high else f"{low}-{high}"
            table.add_row(name, text, f"{computed:.0f}", f"{computed / middle - 1:+.0%}")
    console.print(table)
    return found["problems"]


def sweep(overrides: list[str], console: Console) -> Table:
    """One row for each hardware option that has a GPU."""
    columns = (
        "hardware",
        "fits",
        "tightest phase",
        "GiB",
        "sequences at once",
        "s a step",
        "hours",
        "GPU-hours",
        "price",
    )
    table = Table(*columns, box=box.MARKDOWN)
    GlobalHydra.instance().clear()
    for path in sorted((CONFIGS / "hardware").glob("*.yaml")):
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = hydra.compose("train", [*overrides, f"hardware={path.stem}"])
        if gpu_of(cfg) is None:
            continue
        try:
            check_ranks(cfg)
        except UserError:
            table.add_row(f"`{path.stem}`", "no", *["-"] * (len(columns) - 2))
            continue
        with console.status(f"{path.stem} ..."):
            found = estimate(cfg)
        phase, parts = max(found["memory"].items(), key=lambda item: sum(item[1].values()))
        total = sum(found["hours"].values())
        table.add_row(
            f"`{path.stem}`",
            "no" if found["problems"] else "yes",
            phase,
            f"{sum(parts.values()) / GIB:.0f} of {found['gpu']['memory_gib']:.0f}",
            f"{found['cache']['sequences']:.0f}",
            f"{found['seconds']['step']:.0f}",
            f"{total:.1f}" if total else "-",
            f"{found['gpu_hours']:.0f}" if total else "-",
            price_text(found["price"]),
        )
    return table


@command("train", TrainKeys)
def main(cfg: DictConfig) -> None:
    console = Console() if Console().is_terminal else Console(width=160)
    if cfg.plan.sweep:
        overrides = [each for each in sys.argv[1:] if not each.startswith("hardware=")]
        console.print(sweep(overrides, console))
        return
    with console.status("torch's memory tracker, half a minute the first time ..."):
        problems = show(cfg, console)
    if problems:
        text = "; ".join(problems)
        if not cfg.force:
            raise UserError(f"this run does not fit. {text}. force=true starts it all the same")
        console.print(f"warning: this run does not fit. {text}", highlight=False)
    else:
        console.print(f"{cfg.name}: fits" if gpu_of(cfg) else f"{cfg.name}: on a CPU")


if __name__ == "__main__":
    logging.getLogger("torch").setLevel(logging.ERROR)
    main()
