"""verl's vLLM server and replica, with the engine arguments that a CPU needs."""

import asyncio
import multiprocessing
import os
from typing import Any

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from verl_recipes.planning.memory import kv_bytes_a_token
from verl_recipes.settings.configuration import PYTHON

Responses = list[tuple[list[int], list[float]]]  # to one prompt: token ids, and their log-probabilities
ANSWER = 60  # seconds for an engine to take requests; if it dies meanwhile, vLLM waits for its answer for ever
BLOCK = 128  # tokens of a block of vLLM's KV cache on a CPU
# Only tokens and their log-probabilities, and only at the end.
CHEAP = {"detokenize": False, "flat_logprobs": True, "output_kind": RequestOutputKind.FINAL_ONLY}


class CPUServer(vLLMHttpServer):
    """verl's server, which can also answer many prompts in one call (batch_rollout.py)."""

    async def launch_server(self, *args: Any, **kwargs: Any) -> None:
        if python := os.environ.get(PYTHON):  # forkserver.py
            multiprocessing.set_executable(python)
        await super().launch_server(*args, **kwargs)

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        rollout = self.config
        longest = min(rollout.max_model_len, rollout.prompt_length + rollout.response_length)
        tokens = rollout.max_num_seqs * -(-longest // BLOCK) * BLOCK
        shape = self.model_config.hf_config.get_text_config().to_dict()
        defaults = {
            "worker_extension_cls": "verl_recipes.cpu.worker_extension.CPUWorkerExtension",
            # "uni" is the worker inside the engine's process, without spinning.
            "distributed_executor_backend": "uni" if self.replica_world_size == 1 else "mp",
            "max_model_len": longest,
            # Room for all sequences, but at most 1 GiB; vLLM's own default is a share of the machine's memory.
            "kv_cache_memory_bytes": min(tokens * int(kv_bytes_a_token(shape, "float32", 1)), 2**30),
            # vLLM fails on a CPU if it computes half a prompt of a request that has a seed.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(rollout.max_num_batched_tokens, longest),
        }
        engine_kwargs.update(defaults | engine_kwargs)

    async def generate_batch(
        self, prompts: list[list[int]], sampling: list[dict[str, Any]]
    ) -> tuple[list[Responses], int]:
        """Responses to each prompt, with vLLM's SamplingParams of its own; and the step whose weights made them."""
        # vLLM's sampler for CPUs ignores every seed while a greedy request, which has none, is in the batch
        # (topk_topp_sampler.py, forward_cpu). So greedy requests are a batch of their own.
        answers: dict[int, Responses] = {}
        for greedy in (False, True):
            if chosen := [i for i, each in enumerate(sampling) if (each["temperature"] == 0) == greedy]:
                answers |= zip(chosen, await self.together([(prompts[i], sampling[i]) for i in chosen]), strict=True)
        return [answers[i] for i in range(len(prompts))], self.global_steps or 0

    async def together(self, requests: list[tuple[list[int], dict[str, Any]]]) -> list[Responses]:
        """Answers to requests that vLLM starts only when it has all of them.

        So the same requests are computed together each time, and the last bit of every logit does not depend on when
        they arrive.
        """
        self.batches = getattr(self, "batches", 0) + 1
        async with asyncio.timeout(ANSWER):
            await self.engine.pause_generation(mode="keep", clear_cache=False)
            try:
                waiting = [
                    await self.engine.add_request(
                        f"{self.batches}-{i}",
                        {"type": "token", "prompt_token_ids": prompt},
                        SamplingParams(**sampling, **CHEAP),
                    )
                    for i, (prompt, sampling) in enumerate(requests)
                ]
            finally:
                await self.engine.resume_generation()
        return [
            [(list(output.token_ids), output.logprobs.logprobs) for output in (await each.get()).outputs]
            for each in waiting
        ]


class CPUReplica(vLLMReplica):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(CPUServer)
