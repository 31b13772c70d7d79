"""What one pass of training holds on a GPU, by torch's own memory tracker, and before anything is started.

The model is built on fake tensors, sharded by FSDP2 over a process group that is not there, and taken through a forward
pass, a backward pass and an optimizer step, while torch.distributed._tools.fsdp2_mem_tracker follows every storage. No
byte is allocated; Qwen2.5-3B takes 20 s on a CPU.
"""

import hashlib
import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from inspect import getsource
from types import MethodType
from typing import Any

from verl_recipes.planning.model import BYTES
from verl_recipes.settings.configuration import user_cache

PIECE = 512  # tokens; verl.utils.experimental.torch_functional.FusedLinearForPPO's chunk_size


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
    fused: bool  # verl's fused kernels in torch: logits of PIECE tokens at a time
    flash: bool  # without `fused`: flash-attn's cross entropy and a compiled entropy; if false, what verl does instead


def cached(work: Pass) -> dict[str, float]:
    """`track`, kept in a file: the answer depends on nothing but the pass, torch and this module's code."""
    import torch

    key = json.dumps([asdict(work), torch.__version__, getsource(sys.modules[__name__])])
    path = user_cache("plan") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):  # it is not there, or a plan that was killed left a part of it
        return json.loads(path.read_text(encoding="utf-8"))
    result = track(work)
    with suppress(OSError):  # a home that cannot be written costs time at the next plan, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result), encoding="utf-8")
    return result


def track(work: Pass) -> dict[str, float]:
    """Bytes on one rank, by what holds them.

    Returns:
        parameters, optimizer: held from one step to the next (optimizer after its first step);
        gradients, gathered, activations, logits: beside them when the pass needs most. `gathered` are whole layers and
        FSDP's buffers of communication. Gradients count in full, as a second micro-batch finds those of the first.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=work.ranks)
    try:
        if work.fsdp_size == work.ranks:
            mesh = init_device_mesh("cpu", (work.ranks,))
        else:
            sizes = (work.ranks // work.fsdp_size, work.fsdp_size)
            mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("ddp", "fsdp"))
        model = meta_model(work)
        with torch._subclasses.fake_tensor.FakeTensorMode():
            shard(to_fake(model), mesh, work)
            peak, after, logits = one_step(model, work)
    finally:
        torch.distributed.destroy_process_group()
    temporary = peak["Activation"] + peak["Temp"] + peak["Inputs"] + peak["Buffer"]
    return {
        "parameters": after["Sharded Param"],
        "optimizer": after["OptState"],
        "gradients": after["Sharded Grad"] + peak["Unsharded Grad"],
        "gathered": peak["Unsharded Param"] + peak["All Gather"] + peak["Reduce Scatter"],
        "activations": temporary - logits,
        "logits": logits,
    }


def dtype(name: str) -> Any:
    """torch's type of this name in verl's configuration."""
    import torch

    return {4: torch.float32, 2: torch.bfloat16}[BYTES[name]]


def meta_model(work: Pass) -> Any:
    """The model of a pass on the meta device, as transformers and peft change it in ways that fake tensors refuse."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    config = AutoConfig.for_model(**json.loads(work.shape))
    config.num_labels, config.classifier_dropout = 1, 0.0
    model_class = AutoModelForTokenClassification if work.value_head else AutoModelForCausalLM
    with torch.device("meta"):
        model = model_class.from_config(config, dtype=dtype(work.model_dtype), attn_implementation="sdpa")
        if work.fused and not work.value_head:
            model.forward = MethodType(fused_forward, model)
        if work.lora:
            from peft import LoraConfig, get_peft_model

            rank, targets = json.loads(work.lora)
            model.enable_input_require_grads()
            model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets)).to(dtype(work.model_dtype))
        model.tie_weights()
    if work.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def to_fake(model: Any) -> Any:
    """The model with fake tensors in the place of meta ones, each tied one once."""
    import torch
    from torch.nn import Parameter

    fake: dict[Parameter, Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight not in fake:
                fake[weight] = Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
            module.register_parameter(name, fake[weight])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)
    return model


def shard(model: Any, mesh: Any, work: Pass) -> None:
    """Shard as verl.utils.fsdp_utils.apply_fsdp2 does: every layer, embedding and head if they are two, the root."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # verl_recipes/in_verl/engines.py: fused kernels read the head's weight with the root's.
    ends = () if model.config.tie_word_embeddings or work.fused else ("embed_tokens", "lm_head")
    policy = MixedPrecisionPolicy(param_dtype=dtype(work.param_dtype), reduce_dtype=dtype(work.reduce_dtype))
    for name, module in list(model.named_modules()):
        if type(module).__name__ in model._no_split_modules or name.rpartition(".")[2] in ends:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=work.reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=work.reshard)


def one_step(model: Any, work: Pass) -> tuple[dict[str, float], dict[str, float], float]:
    """Bytes by torch's categories when the pass needs most, the same after the step, and the logits at the peak."""
    import torch
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    tokens = work.rows * work.tokens
    words = (min(tokens, PIECE) if work.fused else tokens) * model.config.vocab_size

    class Tracker(FSDPMemTracker):
        """Also says how much of the peak are tensors of one entry a token and word of the vocabulary."""

        logits = 0

        def _update_peak_stats(self, peak_state: Any) -> None:
            before = sum(self._peak_mem.values())
            super()._update_peak_stats(peak_state)
            if sum(self._peak_mem.values()) > before:
                infos = (info for info, _ in self._WINFO.values() if info.reftype.value in ("Activation", "Temp"))
                self.logits = sum(info.mem_consumed for info in infos if info.mem_consumed in (2 * words, 4 * words))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer_class = getattr(torch.optim, work.optimizer, torch.optim.AdamW)
    optimizer = optimizer_class(trained, foreach=False)  # the tracker miscounts foreach's states as unsharded
    model.train(work.train)
    ids = torch.zeros((work.rows, work.tokens), dtype=torch.long)
    tracker = Tracker(model, optimizer)
    tracker.track_inputs((ids,))
    with tracker, torch.set_grad_enabled(work.train):
        output = model(input_ids=ids, use_cache=False).logits
        loss = output.float().mean() if work.value_head or work.fused else loss_of(output, ids, work)
        del output
        if work.train:
            loss.backward()
            del loss
        (peak,), logits = tracker.get_tracker_snapshot("peak").values(), tracker.logits
        if work.train:
            optimizer.step()
        (after,) = tracker.get_tracker_snapshot("current").values()
    at_peak, held = ({getattr(k, "value", k): float(v) for k, v in snapshot.items()} for snapshot in (peak, after))
    return at_peak, held, float(logits)


def fused_forward(model: Any, input_ids: Any, **settings: Any) -> Any:
    """A forward pass with log-probabilities in the place of logits, as verl's fused kernels in torch make them.

    They go over PIECE tokens at a time, and compute the logits of each piece again in the backward pass.

    Args:
        model: a language model of transformers', whose `forward` this is.
        input_ids: shape (rows, tokens).
        settings: of its layers' pass.
    """
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_outputs import CausalLMOutput

    weight = model.lm_head.weight

    def log_probs(hidden: Any, ids: Any) -> Any:
        logits = (hidden @ weight.t()).float()
        return torch.gather(logits.log_softmax(-1), -1, ids[:, None])

    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    pieces = zip(hidden.split(PIECE), input_ids.flatten().split(PIECE), strict=True)
    return CausalLMOutput(logits=torch.cat([checkpoint(log_probs, *piece, use_reentrant=False) for piece in pieces]))


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
