"""A model of time: the seconds of a step and the hours of a run. configs/facts/assumptions.yaml has its assumptions.

Decoding reads all weights once for each token of the longest response, and each sequence's keys and values once for
each of its own tokens. A pass over the batch takes its FLOPs at a fixed share of the GPU's peak, or the time in which
FSDP's weights move between the GPUs if that is longer. What verl takes beside that was measured on a card with small
models (docs/gpu.md). The rest was not; `published` compares it with published runs.
"""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from data_prep.cli import CONFIGS, as_list
from verl_recipes.planning.memory import kv_bytes_a_token, parameters_of, shape_of
from verl_recipes.planning.model import facts, needs_critic
from verl_recipes.planning.space import checkpoint_bytes
from verl_recipes.settings.configuration import gpus_of, is_split, needs_reference


@dataclass(frozen=True)
class Work:
    """The work of one step; lengths in tokens."""

    shape: dict[str, Any]  # the model's config.json
    train_gpus: int
    rollout_gpus: int  # the same GPUs unless `split`
    sequences: int
    groups: int  # prompts
    prompt: int  # the longest
    response: int  # the longest
    micro_batches: float  # of a pass over the whole batch, on one GPU
    mean_response: float | None = None
    nodes: int = 1
    tensor_parallel: int = 1
    concurrent: float = 256  # sequences in one vLLM engine at once
    rounds: int = 1  # calls of the generating engine, one after another
    split: bool = False
    waits: bool = False  # with `split`: training still waits for generation
    old_log_probs: bool = True
    reference: bool = False
    critic: bool = False
    epochs: int = 1
    checkpointing: bool = True
    lora: bool = False
    offloaded_bytes: float = 0.0  # moved to one GPU and back in each step
    verl: bool = True  # trained by verl, whose own seconds were measured


def generation(work: Work, gpu: dict[str, Any], sequences: float, groups: float) -> float:
    """The seconds in which so many prompts (`groups`) get so many responses (`sequences`)."""
    a, shape = facts("assumptions")["time"], work.shape
    mean = work.mean_response or a["response_share"] * work.response
    last = min(work.response, a["longest"] * mean)
    parameters = parameters_of(shape) / work.tensor_parallel
    engines = work.rollout_gpus / work.tensor_parallel
    share = sequences / engines / work.rounds  # sequences of one engine in one round
    steps = max(last, share * mean / max(1.0, min(work.concurrent, share)))
    bandwidth, flops = a["bandwidth"] * gpu["memory_gb_s"] * 1e9, a["utilisation"] * gpu["tflops"] * 1e12
    context = a["prompt_share"] * work.prompt + mean / 2
    of_a_token = kv_bytes_a_token(shape, "bf16", work.tensor_parallel) * context / bandwidth + a["decode_sequence_s"]
    decode = steps * (2 * parameters / bandwidth + a["decode_step_s"]) + share * mean * of_a_token
    prefill = groups / engines / work.rounds * a["prompt_share"] * work.prompt * 2 * parameters / flops
    return float(work.rounds * (decode + prefill))


def seconds(work: Work, gpu: dict[str, Any]) -> dict[str, float]:
    """The seconds of each part of a step, and `step`, the seconds of the whole step."""
    a, shape = facts("assumptions")["time"], work.shape
    parameters = parameters_of(shape)
    mean = work.mean_response or a["response_share"] * work.response
    length = a["prompt_share"] * work.prompt + mean
    a_token = 2 * parameters + 2 * shape["num_hidden_layers"] * shape["hidden_size"] * length
    flops = a["utilisation"] * gpu["tflops"] * 1e12
    tokens = work.sequences * length / work.train_gpus
    forward = tokens * a_token / flops
    beside = tokens * a["pass_token_s"] * work.verl  # of a forward pass of the policy
    link = a["node_gb_s"] if work.nodes > 1 else a["link"] * gpu["link_gb_s"]
    gather = 2 * parameters * (1 - 1 / work.train_gpus) / (link * 1e9) * work.micro_batches  # bf16, each once
    passes = (2 if work.lora else 3) + (1 if work.checkpointing else 0)
    update = max(passes * forward, (2 if work.lora else 4) * gather)  # two gathers, gradients in fp32
    parts = {"generate": generation(work, gpu, work.sequences, work.groups)}
    if work.old_log_probs:
        parts["old log-probabilities"] = max(forward, gather) + beside
    if work.reference:
        parts["reference"] = max(forward, gather) + beside
    if work.critic:
        parts["values and critic"] = max(forward, gather) + beside / 2 + work.epochs * (update + beside)
    parts["update"] = work.epochs * (update + 2 * beside)
    parts["offload"] = 2 * work.offloaded_bytes / (a["link"] * gpu["host_gb_s"] * 1e9)
    if work.verl:
        parts["weights, sleep and wake"] = a["switch_s"] + 2 * parameters / (a["weights_gb_s"] * 1e9)
        parts["other"] = a["other_s"] + a["other_sequence_s"] * work.sequences
    total = sum(parts.values())
    if work.split and not work.waits:  # generation runs beside the rest
        total = max(parts["generate"], total - parts["generate"])
    return {name: value for name, value in parts.items() if value} | {"step": total}


def work_of(cfg: DictConfig, memory: dict[str, dict[str, float]], concurrent: float) -> Work:
    """The work of one step of a configured run.

    Args:
        memory: as from `planning.memory.phases`, for the bytes that offloading moves.
        concurrent: sequences that one vLLM engine holds at once.
    """
    models = cfg.actor_rollout_ref
    actor, (train, alone) = models.actor, gpus_of(cfg)
    sequences = cfg.data.train_batch_size * models.rollout.n
    a = facts("assumptions")["time"]
    mean = cfg.plan.response_tokens or a["response_share"] * cfg.data.max_response_length
    tokens = sequences / train * (a["prompt_share"] * cfg.data.max_prompt_length + mean)
    if actor.use_dynamic_bsz:
        micro_batches = max(1.0, tokens / actor.ppo_max_token_len_per_gpu)
    else:
        micro_batches = max(1.0, sequences / train / actor.ppo_micro_batch_size_per_gpu)
    offloaded = 0.0
    for engine, phase in ((actor.fsdp_config, "update actor"), (cfg.critic.fsdp, "update critic")):
        if phase in memory:
            offloaded += memory[phase]["parameters"] * bool(engine.param_offload or engine.offload_policy)
            offloaded += memory[phase]["optimizer"] * bool(engine.optimizer_offload or engine.offload_policy)
    return Work(
        shape=shape_of(cfg),
        train_gpus=train,
        rollout_gpus=alone or train,
        split=is_split(cfg),
        waits=not cfg.trainer.v1.separate_async.num_warmup_batches,
        nodes=cfg.trainer.nnodes,
        sequences=sequences,
        groups=cfg.data.train_batch_size,
        prompt=cfg.data.max_prompt_length,
        response=cfg.data.max_response_length,
        mean_response=mean,
        micro_batches=micro_batches,
        tensor_parallel=models.rollout.tensor_model_parallel_size,
        concurrent=concurrent,
        old_log_probs=not cfg.algorithm.rollout_correction.bypass_mode,
        reference=needs_reference(cfg),
        critic=needs_critic(cfg),
        epochs=actor.ppo_epochs,
        checkpointing=models.model.enable_gradient_checkpointing,
        lora=models.model.lora_rank > 0,
        offloaded_bytes=offloaded,
    )


def hours(cfg: DictConfig, work: Work, gpu: dict[str, Any], step: float) -> dict[str, float]:
    """Hours of the whole run by part: start, steps, tests, checkpoints."""
    a, steps = facts("assumptions")["time"], cfg.trainer.total_training_steps
    files, every = as_list(cfg.data.val_files), cfg.trainer.test_freq
    made = all(Path(each).is_file() for each in files)
    problems = sum(pq.read_metadata(each).num_rows for each in files) if made else a["test_problems"]
    tests = 1 + (ceil(steps / every) if every > 0 else 1)  # before training, and always after the last step
    test = generation(work, gpu, problems * cfg.actor_rollout_ref.rollout.val_kwargs.n, problems)
    saves = ceil(steps / cfg.trainer.save_freq)
    size = checkpoint_bytes(cfg, parameters_of(work.shape))
    parts = {
        "start": a["start_s"],
        "steps": steps * step,
        "tests": tests * test,
        "checkpoints": saves * size / (a["save_gb_s"] * 1e9),
    }
    return {name: value / 3600 for name, value in parts.items()}


def published() -> list[tuple[str, list[float] | None, float]]:
    """For each published run: its name, the published seconds a step (low, high), and the seconds by this model."""
    found = []
    for each in facts("assumptions")["published"]:
        work = dict(each["work"])
        model = OmegaConf.load(CONFIGS / "model" / f"{work.pop('model')}.yaml")
        shape = shape_of(OmegaConf.create({"architecture": model.architecture}))
        step = seconds(Work(shape=shape, **work), facts("gpus")[each["gpu"]])["step"]
        found.append((each["name"], each["seconds"], step + each.get("overhead_s", 0.0)))
    return found
