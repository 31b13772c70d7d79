"""The estimate of a run on GPUs: memory by phase, seconds by part, hours and price, and what does not fit."""

from typing import Any

from omegaconf import DictConfig

from data_prep.cli import UserError
from verl_recipes.planning import time as plan_time
from verl_recipes.planning.memory import GIB, phases, vllm
from verl_recipes.planning.model import facts, needs_critic
from verl_recipes.settings.configuration import check_choice, check_ranks, gpus_of, longest

OFFLOAD = "actor_rollout_ref.actor.fsdp_config.{param_offload,optimizer_offload}=true"


def gpu_of(cfg: DictConfig) -> dict[str, Any] | None:
    """The facts about the run's GPU; None for a CPU."""
    if cfg.trainer.device == "cpu":
        return None
    if cfg.card.name not in facts("gpus"):
        raise UserError(f"card.name={cfg.card.name} is unknown; configs/facts/gpus.yaml has {', '.join(facts('gpus'))}")
    return facts("gpus")[cfg.card.name]


def advice(cfg: DictConfig, phase: str) -> str:
    """The settings that would make a phase smaller, the cheapest first."""
    models = cfg.actor_rollout_ref
    actor, rollout, model = models.actor, models.rollout, models.model
    engine = actor.fsdp_config
    if phase in ("generate", "weights to vllm"):
        utilisation = rollout.gpu_memory_utilization
        settings = [
            (not (engine.param_offload and engine.optimizer_offload), OFFLOAD),
            (
                utilisation > 0.3 and phase == "generate",
                f"actor_rollout_ref.rollout.gpu_memory_utilization below {utilisation}",
            ),
            (True, "actor_rollout_ref.rollout.tensor_model_parallel_size higher"),
        ]
    else:
        key = "ppo_max_token_len_per_gpu" if actor.use_dynamic_bsz else "ppo_micro_batch_size_per_gpu"
        now = actor[key] or 0
        least = longest(cfg) if actor.use_dynamic_bsz else 1
        other = "critic.fsdp" if phase == "update actor" else "actor_rollout_ref.actor.fsdp_config"
        settings = [
            (not model.enable_gradient_checkpointing, "actor_rollout_ref.model.enable_gradient_checkpointing=true"),
            (now > least, f"actor_rollout_ref.actor.{key} below {now}, down to {least}"),
            (needs_critic(cfg), f"{other}.{{param_offload,optimizer_offload}}=true"),
            (not engine.offload_policy, "actor_rollout_ref.actor.fsdp_config.offload_policy=true (slower)"),
            (not model.lora_rank, "tuning=lora"),
        ]
    return "; ".join([text for useful, text in settings if useful] + ["more GPUs, or a smaller model"])


def misfits(cfg: DictConfig, memory: dict[str, dict[str, float]], gpu: dict[str, Any], sequences: float) -> list[str]:
    """One line for each thing that does not fit."""
    lines = []
    try:
        check_choice(cfg)
    except UserError as error:
        lines.append(error.message)
    for phase, parts in memory.items():
        need = sum(parts.values()) / GIB
        if need > gpu["memory_gib"]:
            lines.append(f"{phase}: {need:.1f} GiB of {gpu['memory_gib']}; change: {advice(cfg, phase)}")
    if sequences < 1:  # at once in vLLM
        lines.append(
            f"generate: the KV cache does not hold one sequence of {longest(cfg)} tokens; change: "
            "actor_rollout_ref.rollout.gpu_memory_utilization or tensor_model_parallel_size higher"
        )
    return lines


def price_of(cfg: DictConfig, gpu: dict[str, Any]) -> tuple[list[float], str] | None:
    """[low, high] of a GPU-hour and the currency, from the configuration or else the GPU's facts; None without any."""
    price = cfg.plan.price
    if price is None:
        return (gpu["price"], gpu["currency"]) if gpu["price"] else None
    return ([price] * 2 if isinstance(price, int | float) else list(price)), cfg.plan.currency


def estimate(cfg: DictConfig) -> dict[str, Any]:
    """Everything that plan shows about a run on GPUs."""
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
        "price": [f"{gpu_hours * each:.0f}" for each in price[0]] + [price[1]] if price else None,
        "problems": misfits(cfg, memory, gpu, cache["sequences"]),
    }
