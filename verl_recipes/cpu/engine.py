"""verl's FSDP2 engines on a CPU: policy, reference and critic."""

from math import gcd
from typing import Any

import torch
from joblib import cpu_count
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry

from verl_recipes.in_verl.agreement import Engine, Loss
from verl_recipes.in_verl.engines import PolicyEngine, ValueEngine
from verl_recipes.settings.configuration import MICRO_BATCH


class OnCPU(Engine):
    """Added to an engine: all cores, and micro-batches of sequences of similar length."""

    def initialize(self) -> None:
        """Share the cores that the run may use among the ranks: affinity and a container's limit count.

        Ray gives one thread, but the rollout engine rests while a rank works.
        """
        torch.set_num_threads(max(1, cpu_count() // torch.distributed.get_world_size()))
        super().initialize()

    def forward_backward_batch(self, data: TensorDict, loss_function: Loss, forward_only: bool = False) -> Any:
        """verl's pass over a batch, with sequences of similar length in one micro-batch, padded to the longest of them.

        verl's own ways either mix the lengths, which makes two thirds of the tiny run padding, or pack the sequences
        (`use_remove_padding`), which pays on a GPU alone. If packing is asked for, the pass is verl's.

        Args:
            data: a batch with `input_ids`, nested, shape (batch, prompt and response tokens); the results keep its
                order.
        """
        if tu.get_non_tensor_data(data, "use_remove_padding", True):
            return super().forward_backward_batch(data, loss_function, forward_only)
        order = data["input_ids"].offsets().diff().argsort()
        data = tu.index_select_tensor_dict(data, order)
        tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=gcd(len(data), MICRO_BATCH))
        output = super().forward_backward_batch(data, loss_function, forward_only)
        back = order.argsort()
        for name, sorted_rows in output["model_output"].items():
            rows = sorted_rows.unbind()
            output["model_output"][name] = torch.nested.as_nested_tensor([rows[i] for i in back], layout=torch.jagged)
        return output


@EngineRegistry.register("language_model", "fsdp2", "cpu")
class CPUEngineWithLMHead(OnCPU, PolicyEngine):
    """Policy and reference."""

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        # verl 0.9.1 gives a forward-only (reference) module CPUOffloadPolicy(pin_memory=True), and pinning memory needs
        # an accelerator. Its parameters are on the CPU anyway, so it is wrapped like a trained module.
        forward_only, self.engine_config.forward_only = self.engine_config.forward_only, False
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config.forward_only = forward_only


@EngineRegistry.register("value_model", "fsdp2", "cpu")
class CPUEngineWithValueHead(OnCPU, ValueEngine):
    """PPO's critic."""
