"""Receives new weights in vLLM's worker.

After loading, vLLM's linear layers on a CPU keep only a packed copy of their weight and drop the parameter
(vllm/model_executor/layers/linear.py), so verl's `model.load_weights` would find nothing to fill. vLLM's own
`reload_weights` restores the parameters, loads them and packs them again.
"""

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from verl_recipes.cpu.weight_socket import joined
from verl_recipes.in_verl.weight_socket import WorkerExtension


class CPUWorkerExtension(WorkerExtension):
    """Loads whole models. A LoRA adapter is loaded by verl's own code."""

    def update_weights_from_ipc(
        self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        if peft_config and base_sync_done:
            super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
            return
        received: list[tuple[str, torch.Tensor]] = []
        receiver = BucketedWeightReceiver(self._get_zmq_handle(), torch.device("cpu"), use_shm)
        receiver.receive_weights(  # clone: the next bucket overwrites this one
            lambda bucket, is_last: received.extend((name, weight.clone()) for name, weight in bucket)
        )
        self.model_runner.reload_weights(weights_iterator=joined(received))
        # The reload does not pack a tied lm_head (the embedding itself) again. It would go on sampling from the old
        # weights, and the run would look healthy and learn nothing.
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, VocabParallelEmbedding):
                layer.quant_method.process_weights_after_loading(layer)
