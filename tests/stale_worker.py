"""A vLLM worker extension that receives new weights and does not load them: what the guard must notice."""

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

from verl_recipes.cpu.worker_extension import CPUWorkerExtension


class StaleWorker(CPUWorkerExtension):
    def update_weights_from_ipc(self, peft_config=None, base_sync_done=False, use_shm=False):
        receiver = BucketedWeightReceiver(self._get_zmq_handle(), torch.device("cpu"), use_shm)
        receiver.receive_weights(lambda bucket, is_last: None)
