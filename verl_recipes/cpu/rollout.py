"""vLLM rollouts on a CPU: verl's replica, with the engine arguments that a CPU needs."""

from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry


def register() -> None:
    """Make `actor_rollout_ref.rollout.name=vllm` mean the replica of vllm_server.py."""
    RolloutReplicaRegistry.register("vllm", load_replica)


def load_replica() -> type[RolloutReplica]:
    """verl's vLLM replica with other defaults; what the user sets in `rollout.engine_kwargs.vllm` stays."""
    from verl_recipes.cpu.vllm_server import CPUReplica

    return CPUReplica
