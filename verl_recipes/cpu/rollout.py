"""vLLM rollouts on a CPU: verl's replica, with the engine arguments that a processor needs."""

import asyncio
from typing import Any

import ray
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry


def register() -> None:
    """Make `actor_rollout_ref.rollout.name=vllm` mean the replica below."""
    RolloutReplicaRegistry.register("vllm", load_replica)


def load_replica() -> type[RolloutReplica]:
    """verl's vLLM replica with other defaults; what the user sets in `rollout.engine_kwargs.vllm` stays."""
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    class CPUServer(vLLMHttpServer):
        """verl's server, which can also answer many prompts in one call (batch_rollout.py)."""

        async def generate_batch(
            self, prompts: list[list[int]], sampling: dict[str, Any]
        ) -> tuple[list[list[tuple[list[int], list[float]]]], int]:
            """`n` responses to each prompt.

            Args:
                prompts: token ids.
                sampling: keyword arguments of vLLM's SamplingParams.

            Returns:
                For every prompt the responses, each its token ids and their log-probabilities; and the training step
                whose weights made them.
            """

            async def answer(prompt: list[int], request_id: str) -> list[tuple[list[int], list[float]]]:
                params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
                results = [r async for r in self.engine.generate({"prompt_token_ids": prompt}, params, request_id)]
                return [
                    (list(o.token_ids), [lp[token].logprob for token, lp in zip(o.token_ids, o.logprobs, strict=True)])
                    for o in results[-1].outputs
                ]

            self.batches = getattr(self, "batches", 0) + 1
            answers = (answer(prompt, f"{self.batches}-{i}") for i, prompt in enumerate(prompts))
            return await asyncio.gather(*answers), self.global_steps or 0

    class CPUReplica(vLLMReplica):
        def __init__(self, replica_rank: int, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(replica_rank, config, *args, **kwargs)
            self.server_class = ray.remote(CPUServer)
            engine = {"worker_extension_cls": "verl_recipes.cpu.worker_extension.CPUWorkerExtension"}
            if self.world_size == 1:
                engine["distributed_executor_backend"] = "uni"  # the worker inside the engine's process, no spinning
            self.config.engine_kwargs["vllm"] = engine | (self.config.engine_kwargs.get("vllm") or {})

    return CPUReplica
