"""vLLM rollouts on a CPU: verl's replica, with the engine arguments that a processor needs."""

from typing import Any

from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry


def register() -> None:
    """Make `actor_rollout_ref.rollout.name=vllm` mean the replica below."""
    RolloutReplicaRegistry.register("vllm", load_replica)


def load_replica() -> type[RolloutReplica]:
    """verl's vLLM replica with other defaults; what the user sets in `rollout.engine_kwargs.vllm` stays."""
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMReplica

    class CPUReplica(vLLMReplica):
        def __init__(self, replica_rank: int, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(replica_rank, config, *args, **kwargs)
            engine = {"worker_extension_cls": "verl_recipes.cpu.worker_extension.CPUWorkerExtension"}
            if self.world_size == 1:
                engine["distributed_executor_backend"] = "uni"  # the worker inside the engine's process, no spinning
            self.config.engine_kwargs["vllm"] = engine | (self.config.engine_kwargs.get("vllm") or {})

    return CPUReplica
