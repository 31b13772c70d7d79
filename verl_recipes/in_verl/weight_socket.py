"""The socket where a training rank and its vLLM engine meet for new weights: one of the run's own.

verl 0.9.1 names it only by Ray's job number, in /tmp, and every Ray cluster counts its jobs from 1. So two runs on one
machine removed each other's socket, and waited for ever or received the other's weights.
"""

import os
from typing import Any

from verl.workers.rollout.vllm_rollout import ServerAdapter
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from verl_recipes.in_verl import sampling


def own_address(handle: str) -> str:
    """verl's address of the socket, with the run's folder (run/supervise.py sets TMPDIR) in place of /tmp."""
    return handle.replace("ipc:///tmp/", f"ipc://{os.environ.get('TMPDIR', '/tmp')}/")


class WorkerExtension(vLLMColocateWorkerExtension):
    """The end in vLLM's worker, named by configs/card/80gb.yaml."""

    def _get_zmq_handle(self) -> str:
        return own_address(super()._get_zmq_handle())


class OwnServerAdapter(ServerAdapter):
    """The end in the training rank. If the configuration names another worker, as stock verl does, both are verl's."""

    zmq_handle: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sampling.note(self.config.top_p, self.config.top_k)
        worker = f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"
        if (self.config.engine_kwargs.get("vllm") or {}).get("worker_extension_cls") == worker:
            self.zmq_handle = own_address(self.zmq_handle)
