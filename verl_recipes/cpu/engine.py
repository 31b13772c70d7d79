"""verl's FSDP2 engines on a CPU: policy, reference and critic."""

import os
from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry

from verl_recipes.in_verl.engines import PolicyEngine, ValueEngine
from verl_recipes.settings.sizes import MICRO_BATCH

Loss = Callable[..., Any] | None


def use_all_cores() -> None:
    """Share the cores among the ranks. Ray gives a worker one thread, but the rollout engine rests while it works."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // torch.distributed.get_world_size()))


def in_order_of_length(forward_backward_batch: Callable[..., Any], data: TensorDict, *args: Any) -> Any:
    """verl's pass over a batch, with sequences of similar length in one micro-batch, padded to the longest of them.

    verl's own ways either mix the lengths, which makes two thirds of the tiny run padding, or pack the sequences
    (`use_remove_padding`), which pays on a GPU alone. If packing is asked for, the pass is verl's.

    Args:
        forward_backward_batch: the engine's method.
        data: a batch with `input_ids`, nested, shape (batch, prompt and response tokens); the results keep its order.
        args: the method's other arguments.
    """
    if tu.get_non_tensor_data(data, "use_remove_padding", True):
        return forward_backward_batch(data, *args)
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
    """Policy and reference."""

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
        return in_order_of_length(super().forward_backward_batch, data, loss_function, forward_only)


class CPUEngineWithValueHead(ValueEngine):
    """PPO's critic."""

    def initialize(self) -> None:
        use_all_cores()
        super().initialize()

    def forward_backward_batch(self, data: TensorDict, loss_function: Loss, forward_only: bool = False) -> Any:
        return in_order_of_length(super().forward_backward_batch, data, loss_function, forward_only)


EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")(CPUEngineWithLMHead)
EngineRegistry.register(model_type="value_model", backend="fsdp2", device="cpu")(CPUEngineWithValueHead)
