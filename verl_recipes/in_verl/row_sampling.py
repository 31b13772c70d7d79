"""verl's single-turn agent loop, with sampling parameters that a row of the data may set for itself.

An evaluation (run/evaluation.py) gives each row a seed, and greedy rows temperature 0, in `extra_info.sampling`.
On a CPU verl_recipes/cpu/batch_rollout.py does the same for a whole batch. This loop works there too, but vLLM's
sampler for CPUs ignores seeds while a greedy request is in the batch (cpu/vllm_server.py).
"""

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


class RowSampling(SingleTurnAgentLoop):
    """Named `row_sampling` by configs/evaluate/agent_loop.yaml."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        return await super().run(sampling_params | kwargs["extra_info"].get("sampling", {}), **kwargs)
