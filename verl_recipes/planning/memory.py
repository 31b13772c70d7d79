"""The memory of a run on each GPU, phase by phase, computed from verl's configuration before anything starts.

The memory of training is tracked (tracking.py). vLLM's memory follows from its own rule: the KV cache is its share of
the GPU minus the weights and the needs of a step.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from omegaconf import DictConfig

from data_prep.cli import UserError
from verl_recipes.planning.model import BYTES, check_hub, facts, find_model, needs_critic
from verl_recipes.planning.space import GIB
from verl_recipes.planning.tracking import Pass, cached
from verl_recipes.settings.configuration import MICRO_BATCH, check_critic, gpus_of, is_split, longest, needs_reference


def shape_of(cfg: DictConfig) -> dict[str, Any]:
    """The model's config.json, from `architecture` in configs/model, the model's folder, or the hub."""
    if cfg.get("architecture"):
        return {"model_type": "qwen2"} | {key: v for key, v in cfg.architecture.items() if key != "parameters"}
    path = cfg.actor_rollout_ref.model.path
    if folder := find_model(path):
        shape: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        needed = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"}
        if missing := sorted(needed - shape.keys()):
            raise UserError(f"{path}/config.json has no {', '.join(missing)}, which plan counts with")
        return shape
    check_hub(path)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path).to_dict()
    except (OSError, ValueError):
        raise UserError(
            f"actor_rollout_ref.model.path={path}: the hub does not answer, or has no such model; for a mirror set "
            "HF_ENDPOINT, or name a folder with a config.json"
        ) from None


def micro_batch(cfg: DictConfig, worker: Mapping[str, Any], key: str, packed: bool) -> tuple[int, int]:
    """Rows and tokens a row of the largest micro-batch.

    A packed micro-batch is one row as long as its budget. A padded one holds whole sequences of the greatest length.

    Args:
        worker: the configuration that sets the size of micro-batches.
        key: `ppo` for an update, `log_prob` for a pass without one.
    """
    models, ranks, length = cfg.actor_rollout_ref, gpus_of(cfg)[0], longest(cfg)
    prompts = cfg.data.train_batch_size if key == "log_prob" else models.actor.ppo_mini_batch_size
    sequences = max(1, prompts * models.rollout.n // ranks)
    if worker.get("log_prob_use_dynamic_bsz" if key == "log_prob" else "use_dynamic_bsz"):
        budget = worker[f"{key}_max_token_len_per_gpu"]
        if budget < length:
            raise UserError(
                f"{key}_max_token_len_per_gpu={budget} is less than one sequence of {length} tokens: raise it, or "
                "lower data.max_response_length"
            )
    else:
        size = worker[f"{key}_micro_batch_size_per_gpu"]
        if size is None:
            raise UserError(
                f"{key}_micro_batch_size_per_gpu is not set, and neither are dynamic batches: set one of the two"
            )
        budget = size * length
    if packed:
        return 1, min(budget, sequences * length)
    # On a CPU the engine makes the micro-batches (verl_recipes/cpu/engine.py).
    return min(sequences, MICRO_BATCH if cfg.trainer.device == "cpu" else max(1, budget // length)), length


def one_pass(
    cfg: DictConfig, model: DictConfig, engine: DictConfig, worker: Mapping[str, Any], key: str, **settings: Any
) -> Pass:
    """A pass of one worker through one model. Arguments are as in `micro_batch`; `settings` are fields of Pass."""
    ranks, size = gpus_of(cfg)[0], engine.fsdp_size
    packed = bool(model.use_remove_padding) and cfg.trainer.device != "cpu"
    rows, tokens = micro_batch(cfg, worker, key, packed)
    precision = engine.mixed_precision if engine.get("mixed_precision") else {}
    lora = ""
    if model.get("lora_rank", 0) > 0:
        targets = model.target_modules if isinstance(model.target_modules, str) else list(model.target_modules)
        lora = json.dumps([model.lora_rank, targets])
    defaults: dict[str, Any] = {
        "shape": json.dumps(shape_of(cfg), sort_keys=True),
        "ranks": ranks,
        "fsdp_size": ranks if size < 0 or size >= ranks else size,
        "rows": rows,
        "tokens": tokens,
        "optimizer": worker.get("optim", {}).get("optimizer", "AdamW"),
        "value_head": False,
        "model_dtype": engine.model_dtype or "fp32",
        "param_dtype": precision.get("param_dtype", "bf16"),
        "reduce_dtype": precision.get("reduce_dtype", "fp32"),
        "reshard": engine.reshard_after_forward,
        "checkpointing": model.enable_gradient_checkpointing,
        "lora": lora,
        "scaled": cfg.actor_rollout_ref.rollout.temperature != 1.0,
        "fused": bool(model.use_fused_kernels),
        "flash": packed,
    }
    work = Pass(**(defaults | settings))
    # Then the loss has none of these, and passes that differ in nothing else are tracked once.
    return replace(work, scaled=False, entropy=False, flash=False) if work.fused or work.value_head else work


def passes(cfg: DictConfig) -> dict[str, Pass]:
    """The passes of a step by name: actor, log_probs, reference, critic."""
    models = cfg.actor_rollout_ref
    model, actor, rollout, ref = models.model, models.actor, models.rollout, models.ref
    entropy = bool(actor.entropy_coeff or actor.calculate_entropy)
    found = {
        "actor": one_pass(cfg, model, actor.fsdp_config, actor, "ppo", train=True, entropy=entropy),
        "log_probs": one_pass(cfg, model, actor.fsdp_config, rollout, "log_prob", train=False, entropy=True),
    }
    if needs_reference(cfg) and not found["actor"].lora:  # with LoRA the base model is the reference
        found["reference"] = one_pass(cfg, model, ref.fsdp_config, ref, "log_prob", train=False, entropy=False)
    if needs_critic(cfg):
        check_critic(cfg)
        critic = cfg.critic
        settings = {"train": True, "entropy": False, "value_head": True}
        found["critic"] = one_pass(cfg, critic.model, critic.fsdp, critic, "ppo", **settings)
    return found


def kv_bytes_a_token(shape: Mapping[str, Any], dtype: str, tensor_parallel: int) -> float:
    """Bytes of one token's keys and values in all layers, on one of a replica's GPUs."""
    head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
    heads = max(1, heads / tensor_parallel)  # a head is repeated, not divided
    return float(2 * shape["num_hidden_layers"] * heads * head * BYTES[dtype])


def parameters_of(shape: Mapping[str, Any]) -> int:
    """Number of parameters of the language model with this config.json; tied ones count once."""
    return _parameters_of(json.dumps(dict(shape), sort_keys=True))


@cache
def _parameters_of(shape: str) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(shape)))
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def vllm(cfg: DictConfig, memory: float) -> dict[str, float]:
    """vLLM's share of a GPU's memory: bytes by use, and how many whole sequences fit at once.

    vLLM takes `gpu_memory_utilization` of the GPU. Weights, a step's activations, the sampler's logits, CUDA graphs and
    vLLM's own context come out of it, and the rest is KV cache (vllm/v1/worker/gpu_worker.py).
    """
    rollout, assumed = cfg.actor_rollout_ref.rollout, facts("assumptions")["memory"]
    shape, width = shape_of(cfg), BYTES[rollout.dtype]
    parallel = rollout.tensor_model_parallel_size
    weights = parameters_of(shape) * width / parallel
    step = rollout.max_num_batched_tokens * (2 * shape["intermediate_size"] / parallel + 4 * shape["hidden_size"])
    sampler = assumed["sampler_copies"] * rollout.max_num_seqs * shape["vocab_size"] * 4
    graphs = 0.0 if rollout.enforce_eager else assumed["cuda_graphs_gib"] * GIB
    used = step * width + sampler + graphs + assumed["context_gib"] * GIB
    cache_bytes = rollout.gpu_memory_utilization * memory - weights - used
    a_token = kv_bytes_a_token(shape, rollout.dtype, parallel)
    return {
        "weights": weights,
        "kv_cache": max(0.0, cache_bytes),
        "other": used,
        "sequences": min(max(0.0, cache_bytes) / (a_token * longest(cfg)), rollout.max_num_seqs),
    }


def at_rest(
    tracked: dict[str, dict[str, float]], engines: dict[str, DictConfig], without: str = ""
) -> dict[str, float]:
    """Bytes that idle models hold on the GPU, without the model named `without`."""
    held = {"parameters": 0.0, "optimizer": 0.0}
    for name, engine in engines.items():
        if name == without or engine.offload_policy:
            continue
        held["parameters"] += 0.0 if engine.param_offload else tracked[name]["parameters"]
        held["optimizer"] += 0.0 if engine.optimizer_offload else tracked[name]["optimizer"]
    return held


def at_work(
    held: dict[str, float], result: dict[str, float], engine: DictConfig | None, on_gpu: bool
) -> dict[str, float]:
    """Bytes by holder while one model does a pass and the others are idle.

    Args:
        held: as from `at_rest`, without this model.
        result: as from `track`.
        engine: the model's engine settings; None for the reference.
        on_gpu: whether to add what torch's CUDA allocator and optimizers take.
    """
    parts = {key: result[key] for key in ("gradients", "gathered", "activations", "logits")}
    if engine is None or engine.offload_policy:  # verl keeps a reference on the CPU; FSDP brings layers as needed
        parts["gradients"] = 0.0
    else:
        held = {key: size + result[key] for key, size in held.items()}
    elsewhere = parts["gathered"] + parts["activations"] + parts["logits"]
    if on_gpu and parts["gradients"] > elsewhere:  # AdamW's foreach copies as much during its step
        parts["activations"] += parts["gradients"] - elsewhere
    fragments = facts("assumptions")["memory"]["fragments"]
    return held | parts | ({"fragments": fragments * sum(parts.values())} if on_gpu else {})


def weights_to_vllm(cfg: DictConfig, engine: dict[str, float]) -> dict[str, float]:
    """Bytes that the transfer of weights adds to the idle models: the largest tensor, vLLM, a bucket each side."""
    bucket = cfg.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20
    shape = shape_of(cfg)
    width = BYTES[cfg.actor_rollout_ref.actor.fsdp_config.model_dtype or "fp32"]
    embedding = shape["vocab_size"] * shape["hidden_size"] * width
    return {
        "gathered": float(embedding + bucket),
        "vllm weights": engine["weights"],
        "vllm other": facts("assumptions")["memory"]["asleep_gib"] * GIB + bucket,
    }


def phases(cfg: DictConfig, memory: float | None) -> dict[str, dict[str, float]]:
    """Bytes on a GPU in each phase of a step, by what holds them.

    Args:
        memory: bytes of one GPU; None for a CPU, which gives the bytes of one rank's process without vLLM.
    """
    tracked = {name: cached(work) for name, work in passes(cfg).items()}
    models, assumed = cfg.actor_rollout_ref, facts("assumptions")["memory"]
    engines = {"actor": models.actor.fsdp_config} | ({"critic": cfg.critic.fsdp} if "critic" in tracked else {})
    process = {"context": assumed["context_gib"] * GIB} if memory else {}
    shares = not is_split(cfg) or models.get("hybrid_engine", True)  # training GPUs hold vLLM too
    beside = process | ({"vllm asleep": assumed["asleep_gib"] * GIB} if memory and shares else {})

    def working(name: str, result: dict[str, float]) -> dict[str, float]:
        held, engine = at_rest(tracked, engines, name), engines.get(name)
        return at_work(held, result, engine, memory is not None) | beside

    found: dict[str, dict[str, float]] = {}
    engine = vllm(cfg, memory) if memory else None
    if engine:
        held = {"vllm weights": engine["weights"], "kv cache": engine["kv_cache"], "vllm other": engine["other"]}
        found["generate"] = ({} if is_split(cfg) else at_rest(tracked, engines) | process) | held
    resting = {"optimizer": 0.0 if engines["actor"].optimizer_offload else tracked["actor"]["optimizer"]}
    found["old log-probabilities"] = working("actor", tracked["log_probs"] | resting)
    if "reference" in tracked:
        found["reference"] = working("", tracked["reference"])
    if "critic" in tracked:
        found["update critic"] = working("critic", tracked["critic"])
    found["update actor"] = working("actor", tracked["actor"])
    if engine and shares:
        held = at_rest(tracked, engines)
        if models.model.lora_rank and engines["actor"].param_offload:  # verl merges the adapter on the GPU
            held["parameters"] += tracked["actor"]["parameters"]
        found["weights to vllm"] = held | process | weights_to_vllm(cfg, engine)
    return found
