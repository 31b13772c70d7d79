"""Memory of a run on each GPU, phase by phase, from verl's configuration and before anything is started.

What training takes is not estimated: the model is built on fake tensors, sharded by FSDP2 over a process group that is
not there, and taken through a forward pass, a backward pass and an optimizer step, while torch's own tracker
(torch.distributed._tools.fsdp2_mem_tracker) follows every storage. No byte is allocated; Qwen2.5-3B takes 20 s on a
CPU. What vLLM takes follows from its own rule: its share of the GPU, less weights and what a step needs, is KV cache.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from inspect import getsource
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.cli import CONFIGS, UserError
from verl_recipes.settings.configuration import gpus_of, is_split, longest, needs_reference

GIB = 2**30
BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}


@cache
def facts(name: str) -> dict[str, Any]:
    """The content of configs/facts/<name>.yaml."""
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / "facts" / f"{name}.yaml"))  # type: ignore[return-value]


def shape_of(cfg: DictConfig) -> dict[str, Any]:
    """The model's config.json: from the `architecture` of its file in configs/model, its folder, or the hub."""
    if cfg.get("architecture"):
        return {"model_type": "qwen2"} | {key: v for key, v in cfg.architecture.items() if key != "parameters"}
    path = cfg.actor_rollout_ref.model.path
    if (Path(path) / "config.json").is_file():
        return json.loads((Path(path) / "config.json").read_text())
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path).to_dict()
    except (OSError, ValueError):
        raise UserError(f"actor_rollout_ref.model.path={path}: no folder with a config.json, nor on the hub") from None


@dataclass(frozen=True)
class Pass:
    """One pass of one micro-batch through one model, as one rank of FSDP sees it."""

    shape: str  # the model's config.json
    ranks: int
    fsdp_size: int  # ranks that one copy is sharded over
    rows: int  # sequences of a padded micro-batch; 1 where they are packed
    tokens: int  # of a row
    train: bool  # forward, backward and optimizer step; else forward alone
    optimizer: str  # a class of torch.optim; for any other AdamW stands in, which holds more
    value_head: bool  # PPO's critic
    model_dtype: str
    param_dtype: str
    reduce_dtype: str
    reshard: bool
    checkpointing: bool
    lora: str  # rank and target modules as JSON, "" for none
    scaled: bool  # logits are divided by a temperature other than 1
    entropy: bool
    flash: bool  # flash-attn's cross entropy and a compiled entropy; else what verl does without them


def cached(work: Pass) -> dict[str, float]:
    """`track`, kept in a file: the answer depends on nothing but the pass, torch and the code."""
    import torch

    key = json.dumps([asdict(work), torch.__version__, getsource(track), getsource(loss_of)])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "countdown-zero" / "plan" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if path.is_file():
        return json.loads(path.read_text())
    result = track(work)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (partial := path.with_suffix(f".{os.getpid()}")).write_text(json.dumps(result))
        partial.replace(path)
    except OSError:
        pass  # a home that cannot be written costs time at the next plan, no more
    return result


def track(work: Pass) -> dict[str, float]:
    """Bytes on one rank, by what holds them.

    Returns:
        parameters, optimizer: held from one step to the next (optimizer after its first step);
        gradients, gathered, activations, logits: beside them when the pass needs most. `gathered` are whole layers and
        FSDP's buffers of communication. Gradients count in full, as a second micro-batch finds those of the first.
    """
    import torch
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn import Parameter
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    class Tracker(FSDPMemTracker):
        """Also says how much of the peak are tensors of one entry a token and word of the vocabulary."""

        logits, sizes = 0, frozenset[int]()

        def _update_peak_stats(self, peak_state: Any) -> None:
            before = sum(self._peak_mem.values())
            super()._update_peak_stats(peak_state)
            if sum(self._peak_mem.values()) > before:
                held = (info.mem_consumed for info, _ in self._WINFO.values())
                self.logits = sum(size for size in held if size in self.sizes)

    dtypes = {4: torch.float32, 2: torch.bfloat16}
    model_dtype, param_dtype, reduce_dtype = (
        dtypes[BYTES[name]] for name in (work.model_dtype, work.param_dtype, work.reduce_dtype)
    )
    shape = json.loads(work.shape)
    config = AutoConfig.for_model(shape["model_type"], **{k: v for k, v in shape.items() if k != "model_type"})
    config.num_labels, config.classifier_dropout = 1, 0.0
    model_class = AutoModelForTokenClassification if work.value_head else AutoModelForCausalLM
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=work.ranks)
    try:
        if work.fsdp_size == work.ranks:
            mesh = init_device_mesh("cpu", (work.ranks,))
        else:
            sizes = (work.ranks // work.fsdp_size, work.fsdp_size)
            mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("ddp", "fsdp"))
        with torch.device("meta"):  # fake tensors do not allow what transformers and peft do to a model in place
            model = model_class.from_config(config, dtype=model_dtype, attn_implementation="sdpa")
            if work.lora:
                from peft import LoraConfig, get_peft_model

                rank, targets = json.loads(work.lora)
                model.enable_input_require_grads()
                model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets)).to(model_dtype)
            model.tie_weights()
        if work.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch._subclasses.fake_tensor.FakeTensorMode():
            fake: dict[Parameter, Parameter] = {}
            for module in model.modules():
                for name, weight in list(module.named_parameters(recurse=False)):
                    if weight not in fake:
                        fake[weight] = Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
                    module.register_parameter(name, fake[weight])
                for name, buffer in list(module.named_buffers(recurse=False)):
                    module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)
            # As verl.utils.fsdp_utils.apply_fsdp2 does: every layer, embedding and head where they are two, the root.
            ends = () if config.tie_word_embeddings else ("embed_tokens", "lm_head")
            policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
            for name, module in list(model.named_modules()):
                if type(module).__name__ in model._no_split_modules or name.rpartition(".")[2] in ends:
                    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=work.reshard)
            fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=work.reshard)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer_class = getattr(torch.optim, work.optimizer, torch.optim.AdamW)
            optimizer = optimizer_class(trained, foreach=False)  # the tracker miscounts foreach's states as unsharded
            model.train(work.train)
            ids = torch.zeros((work.rows, work.tokens), dtype=torch.long)
            tracker = Tracker(model, optimizer)
            words = work.rows * work.tokens * config.vocab_size
            tracker.sizes = frozenset({2 * words, 4 * words})
            tracker.track_inputs((ids,))
            with tracker, torch.set_grad_enabled(work.train):
                output = model(input_ids=ids, use_cache=False).logits
                loss = output.float().mean() if work.value_head else loss_of(output, ids, work)
                del output
                if work.train:
                    loss.backward()
                    del loss
                (peak,), logits = (tracker.get_tracker_snapshot("peak").values(), tracker.logits)
                if work.train:
                    optimizer.step()
                (after,) = tracker.get_tracker_snapshot("current").values()
    finally:
        torch.distributed.destroy_process_group()
    at_peak, held = ({getattr(k, "value", k): float(v) for k, v in snapshot.items()} for snapshot in (peak, after))
    temporary = at_peak["Activation"] + at_peak["Temp"] + at_peak["Inputs"] + at_peak["Buffer"]
    return {
        "parameters": held["Sharded Param"],
        "optimizer": held["OptState"],
        "gradients": held["Sharded Grad"] + at_peak["Unsharded Grad"],
        "gathered": at_peak["Unsharded Param"] + at_peak["All Gather"] + at_peak["Reduce Scatter"],
        "activations": temporary - logits,
        "logits": float(logits),
    }


def loss_of(logits: Any, ids: Any, work: Pass) -> Any:
    """A number that holds and frees the memory that verl's log-probabilities and entropy do.

    Args:
        logits: shape (rows, tokens, vocabulary).
        ids: token ids, shape (rows, tokens).
    """
    import torch

    if work.flash:
        logits = logits.reshape(-1, logits.shape[-1])  # packed
    if work.scaled:
        logits = logits / torch.ones((*logits.shape[:-1], 1), dtype=logits.dtype)

    class Fused(torch.autograd.Function):
        """A kernel that reads the logits once; its gradient may take their place (flash-attn, inplace_backward)."""

        @staticmethod
        def forward(ctx: Any, logits: Any, in_place: bool) -> Any:
            ctx.save_for_backward(logits)
            ctx.in_place = in_place
            return logits[:, 0].float()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return ctx.saved_tensors[0] if ctx.in_place else torch.empty_like(ctx.saved_tensors[0]), None

    if work.flash:
        loss = Fused.apply(logits, not work.entropy).mean()
        return loss + Fused.apply(logits, False).mean() if work.entropy else loss
    # verl.utils.torch_functional.entropy_from_logits and logprobs_from_logits_v2, whose log-sum-exp goes row by row and
    # so needs no more than its result; the copy of the logits is that of the padded path.
    loss = torch.zeros(())
    if work.entropy:
        probabilities = torch.nn.functional.softmax(logits, dim=-1)
        loss = loss + (torch.logsumexp(logits, dim=-1) - torch.sum(probabilities * logits, dim=-1)).mean()
        del probabilities
    logits, ids = torch.cat(logits.unbind()), ids.reshape(-1, 1)
    return loss + (torch.gather(logits, -1, ids).squeeze(-1) - Fused.apply(logits, False)).mean()


def needs_critic(cfg: DictConfig) -> bool:
    enabled = cfg.critic.enable
    return bool(enabled) if enabled is not None else cfg.algorithm.adv_estimator == "gae"


def passes(cfg: DictConfig) -> dict[str, Pass]:
    """The passes of a step by name: actor, log_probs, reference, critic."""
    models, on_cpu = cfg.actor_rollout_ref, cfg.trainer.device == "cpu"
    actor, ranks = models.actor, gpus_of(cfg)[0]
    cpu_rows = 0
    if on_cpu:  # micro-batches are the CPU engine's matter
        from verl_recipes.cpu import MICRO_BATCH

        cpu_rows = MICRO_BATCH

    def one(model: DictConfig, engine: DictConfig, worker: Mapping[str, Any], key: str, **settings: Any) -> Pass:
        dynamic = worker.get("log_prob_use_dynamic_bsz" if key == "log_prob" else "use_dynamic_bsz")
        prompts = cfg.data.train_batch_size if key == "log_prob" else actor.ppo_mini_batch_size
        sequences = max(1, prompts * models.rollout.n // ranks)
        if dynamic:
            budget = worker[f"{key}_max_token_len_per_gpu"]
            if budget < longest(cfg):
                raise UserError(f"{key}_max_token_len_per_gpu={budget} is less than one sequence ({longest(cfg)})")
        else:
            size = worker[f"{key}_micro_batch_size_per_gpu"]
            if size is None:
                raise UserError(f"{key}_micro_batch_size_per_gpu is not set, and neither are dynamic batches")
            budget = size * longest(cfg)
        rows = min(sequences, cpu_rows or max(1, budget // longest(cfg)))
        packed = bool(model.use_remove_padding) and not on_cpu
        # A packed micro-batch is as long as its budget; a padded one holds whole sequences of the greatest length.
        tokens = min(budget, sequences * longest(cfg)) if packed else longest(cfg)
        precision = engine.mixed_precision if engine.get("mixed_precision") else {}
        lora = ""
        if model.get("lora_rank", 0) > 0:
            targets = model.target_modules if isinstance(model.target_modules, str) else list(model.target_modules)
            lora = json.dumps([model.lora_rank, targets])
        size = engine.fsdp_size
        defaults: dict[str, Any] = {
            "shape": json.dumps(shape_of(cfg), sort_keys=True),
            "ranks": ranks,
            "fsdp_size": ranks if size < 0 or size >= ranks else size,
            "rows": 1 if packed else rows,
            "tokens": tokens,
            "optimizer": worker.get("optim", {}).get("optimizer", "AdamW"),
            "value_head": False,
            "model_dtype": engine.model_dtype or "fp32",
            "param_dtype": precision.get("param_dtype", "bf16"),
            "reduce_dtype": precision.get("reduce_dtype", "fp32"),
            "reshard": engine.reshard_after_forward,
            "checkpointing": model.enable_gradient_checkpointing,
            "lora": lora,
            "scaled": models.rollout.temperature != 1.0,
            "flash": packed,
        }
        return Pass(**(defaults | settings))

    entropy = bool(actor.entropy_coeff or actor.calculate_entropy)
    rollout, engine = models.rollout, actor.fsdp_config
    found = {
        "actor": one(models.model, engine, actor, "ppo", train=True, entropy=entropy),
        "log_probs": one(models.model, engine, rollout, "log_prob", train=False, entropy=True),
    }
    if needs_reference(cfg) and not found["actor"].lora:  # with LoRA the base model is the reference
        found["reference"] = one(
            models.model, models.ref.fsdp_config, models.ref, "log_prob", train=False, entropy=False
        )
    if needs_critic(cfg):
        found["critic"] = one(
            cfg.critic.model, cfg.critic.fsdp, cfg.critic, "ppo", train=True, entropy=False, value_head=True
        )
    return found


def kv_bytes_a_token(shape: Mapping[str, Any], dtype: str, tensor_parallel: int) -> float:
    """Keys and values of one token in all layers, on one of the GPUs of a replica."""
    head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    heads = max(1, shape["num_key_value_heads"] / tensor_parallel)  # a head is not divided, but repeated
    return float(2 * shape["num_hidden_layers"] * heads * head * BYTES[dtype])


def weight_bytes(shape: Mapping[str, Any], dtype: str = "bf16") -> float:
    """All weights in this precision."""
    return parameters_of(json.dumps(dict(shape), sort_keys=True)) * BYTES[dtype]


@cache
def parameters_of(shape: str) -> int:
    """Number of parameters of the language model, each tied one once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def vllm(cfg: DictConfig, memory: float) -> dict[str, float]:
    """What vLLM does with its share of a GPU's memory: bytes by use, and how many whole sequences fit at once.

    vLLM takes `gpu_memory_utilization` of the GPU, holds weights, a step's activations, the sampler's logits, CUDA
    graphs and its own context in it, and gives the rest to the KV cache (vllm/v1/worker/gpu_worker.py).
    """
    rollout, assumed = cfg.actor_rollout_ref.rollout, facts("assumptions")["memory"]
    shape, width = shape_of(cfg), BYTES[rollout.dtype]
    parallel = rollout.tensor_model_parallel_size
    weights = weight_bytes(shape, rollout.dtype) / parallel
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


def phases(cfg: DictConfig, memory: float | None) -> dict[str, dict[str, float]]:
    """Bytes on a GPU in each phase of a step, by what holds them.

    Args:
        cfg: of a run, composed.
        memory: bytes of one GPU; None for a CPU, where the process of one rank is meant and vLLM is left out.
    """
    tracked = {name: cached(work) for name, work in passes(cfg).items()}
    models, assumed = cfg.actor_rollout_ref, facts("assumptions")["memory"]
    engines = {"actor": models.actor.fsdp_config} | ({"critic": cfg.critic.fsdp} if "critic" in tracked else {})
    process = {"context": assumed["context_gib"] * GIB} if memory else {}

    def at_rest(without: str = "") -> dict[str, float]:
        """What the models but this one hold on the GPU while they do nothing."""
        held = {"parameters": 0.0, "optimizer": 0.0}
        for name, engine in engines.items():
            if name == without or engine.offload_policy:
                continue
            held["parameters"] += 0.0 if engine.param_offload else tracked[name]["parameters"]
            held["optimizer"] += 0.0 if engine.optimizer_offload else tracked[name]["optimizer"]
        return held

    def at_work(name: str, result: dict[str, float], engine: DictConfig | None) -> dict[str, float]:
        """A pass of a model, beside the others at rest and vLLM asleep."""
        held = at_rest(name)
        parts = {key: result[key] for key in ("gradients", "gathered", "activations", "logits")}
        if engine is None or engine.offload_policy:  # verl keeps a reference on the CPU; FSDP brings layers as needed
            parts["gradients"] = 0.0
        else:
            held["parameters"] += result["parameters"]
            held["optimizer"] += result["optimizer"]
        elsewhere = parts["gathered"] + parts["activations"] + parts["logits"]
        if memory and parts["gradients"] > elsewhere:  # AdamW's foreach makes a copy of as much while it steps
            parts["activations"] += parts["gradients"] - elsewhere
        asleep = {"vllm asleep": assumed["asleep_gib"] * GIB} if memory and shares else {}
        slack = {"fragments": assumed["fragments"] * sum(parts.values())} if memory else {}
        return held | parts | asleep | process | slack

    shares = not is_split(cfg) or models.get("hybrid_engine", True)  # training GPUs hold vLLM too
    found: dict[str, dict[str, float]] = {}
    engine = vllm(cfg, memory) if memory else None
    if engine:
        held = {"vllm weights": engine["weights"], "kv cache": engine["kv_cache"], "vllm other": engine["other"]}
        found["generate"] = ({} if is_split(cfg) else at_rest() | process) | held
    resting = {"optimizer": 0.0 if engines["actor"].optimizer_offload else tracked["actor"]["optimizer"]}
    found["old log-probabilities"] = at_work("actor", tracked["log_probs"] | resting, engines["actor"])
    if "reference" in tracked:
        found["reference"] = at_work("", tracked["reference"], None)
    if "critic" in tracked:
        found["update critic"] = at_work("critic", tracked["critic"], engines["critic"])
    found["update actor"] = at_work("actor", tracked["actor"], engines["actor"])
    if engine and shares:
        bucket = 2 * models.rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20  # sent and received
        shape = shape_of(cfg)
        embedding = shape["vocab_size"] * shape["hidden_size"] * BYTES[passes(cfg)["actor"].model_dtype]
        found["weights to vllm"] = (
            at_rest()
            | process
            | {
                "gathered": float(embedding + bucket),
                "vllm weights": engine["weights"],
                "vllm other": assumed["asleep_gib"] * GIB,
            }
        )
    return found
