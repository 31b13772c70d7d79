"""verl's FSDP2 engines on a CPU: policy, reference and critic, with a guard against silent corruption."""

import math
import os
from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry

from verl_recipes.cpu.sampling import kept_share
from verl_recipes.in_verl.engines import PolicyEngine, ValueEngine
from verl_recipes.settings.sizes import MICRO_BATCH

Loss = Callable[..., Any] | None
AGREEMENT = 0.99  # below this correlation the rollout engine does not hold the actor's weights


def correlation(rollout_log_probs: torch.Tensor, log_probs: torch.Tensor) -> float:
    """Pearson correlation of two sets of token probabilities, given as log-probabilities of shape (tokens,).

    verl's `training/rollout_actor_probs_pearson_corr`, after arXiv 2506.13585. 1.0 if it is not defined because one of
    the two is constant.
    """
    pair = torch.stack([rollout_log_probs, log_probs]).double().exp()
    value = torch.corrcoef(pair)[0, 1].item() if pair.shape[1] > 1 else 1.0
    return 1.0 if value != value else value


def agreement(responses: torch.Tensor, rollout: torch.Tensor, log_probs: torch.Tensor, nucleus: float = 1.0) -> float:
    """How well the rollout engine's log-probabilities fit the actor's weights, as a correlation.

    Args:
        responses: nested, shape (batch, response tokens).
        rollout: the rollout engine's log-probabilities, in the same shape.
        log_probs: the actor's, nested, shape (batch, prompt and response tokens); entry i predicts token i + 1.
        nucleus: the least share of the probability that sampling kept. vLLM renormalises its log-probabilities over it,
            so they may be larger by up to -log(nucleus).

    Raises:
        RuntimeError: the correlation of the probabilities is under AGREEMENT.
    """
    lengths = [len(response) for response in responses.unbind()]
    actor = [row[-length - 1 : -1] for row, length in zip(log_probs.unbind(), lengths, strict=True)]
    said = torch.cat([row[:length].reshape(-1) for row, length in zip(rollout.unbind(), lengths, strict=True)])
    more = (said - torch.cat(actor)).clamp(min=0.0, max=-math.log(nucleus) if nucleus else math.inf)
    value = correlation(said - more if nucleus < 1 else said, torch.cat(actor))
    if value < AGREEMENT:
        raise RuntimeError(
            f"rollout and actor disagree: their token probabilities correlate at {value:.4f}, under {AGREEMENT}. "
            "The rollout engine does not hold the actor's weights, and training on its samples would corrupt the model."
        )
    return value


def use_all_cores() -> None:
    """Share the cores among the ranks. Ray gives a worker one thread, but the rollout engine rests while it works."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // torch.distributed.get_world_size()))


def in_order_of_length(forward_backward_batch: Callable[..., Any], data: TensorDict, *args: Any) -> Any:
    """verl's pass over a batch, with sequences of similar length in one micro-batch, padded to the longest of them.

    verl's own ways either mix the lengths, which makes two thirds of the tiny run padding, or pack the sequences, which
    pays only with flash attention.

    Args:
        forward_backward_batch: the engine's method.
        data: a batch with `input_ids`, nested, shape (batch, prompt and response tokens); the results keep its order.
        args: the method's other arguments.
    """
    order = data["input_ids"].offsets().diff().argsort()
    data = tu.index_select_tensor_dict(data, order)
    tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=gcd(len(data), MICRO_BATCH))
    output = forward_backward_batch(data, *args)
    for name, rows in output["model_output"].items():
        rows = rows.unbind()
        output["model_output"][name] = torch.nested.as_nested_tensor(
            [rows[i] for i in order.argsort()], layout=torch.jagged
        )
    return output


class CPUEngineWithLMHead(PolicyEngine):
    """Policy and reference.

    After the rollout engine received weights, the first pass over samples compares both sides' log-probabilities. With
    `rollout_correction.bypass_mode`, which has no pass for the old log-probabilities, that is the update's pass.
    """

    unchecked = True

    def get_per_tensor_param(self, *args: Any, **kwargs: Any) -> Any:
        self.unchecked = True
        return super().get_per_tensor_param(*args, **kwargs)

    def initialize(self) -> None:
        use_all_cores()
        super().initialize()

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        # verl 0.9.1 gives a forward-only (reference) module CPUOffloadPolicy(pin_memory=True), and pinning memory needs
        # an accelerator. Its parameters are on the CPU anyway, so it is wrapped like a trained module.
        forward_only, self.engine_config.forward_only = self.engine_config.forward_only, False
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config.forward_only = forward_only

    def forward_backward_batch(self, data: TensorDict, loss_function: Loss, forward_only: bool = False) -> Any:
        rollout = data.get("rollout_log_probs", data.get("old_log_probs", None))
        policy = not (self.engine_config.forward_only or tu.get_non_tensor_data(data, "no_lora_adapter", False))
        check = self.unchecked and policy and rollout is not None
        if check:
            tu.assign_non_tensor(data, return_model_output=True)
        output = in_order_of_length(super().forward_backward_batch, data, loss_function, forward_only)
        if check:
            value = agreement(data["responses"], rollout, output["model_output"]["log_probs"], kept_share())
            self.unchecked = False
            if not forward_only:  # verl has a metric for the other pass
                output["metrics"]["rollout_actor_probs_pearson_corr"] = [value]
        return output


class CPUEngineWithValueHead(ValueEngine):
    """PPO's critic."""

    def initialize(self) -> None:
        use_all_cores()
        super().initialize()

    def forward_backward_batch(self, data: TensorDict, loss_function: Loss, forward_only: bool = False) -> Any:
        return in_order_of_length(super().forward_backward_batch, data, loss_function, forward_only)


EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")(CPUEngineWithLMHead)
EngineRegistry.register(model_type="value_model", backend="fsdp2", device="cpu")(CPUEngineWithValueHead)
