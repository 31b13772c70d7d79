"""Single-turn rollouts as one batch, instead of one agent loop for every response.

verl's agent loop takes 20 to 30 ms of Python for each response, whatever the model's size: a Hydra instantiation, a Ray
call, a reward call and a put into TransferQueue. On a GPU that hides behind generation; here it is most of a step. So
the trainer's own process gives all prompts to vLLM in one call with `n` samples each, scores the responses with verl's
reward worker, and puts them into TransferQueue at once. The trainer finds the same there as after verl's agent loop.

`actor_rollout_ref.rollout.agent.agent_loop_manager_class` names the manager (configs/hardware/cpu.yaml). Agents with
several turns, tools or images need verl's own manager, and so does dynamic sampling with topology=split, where weights
are sent while responses are being written. Then set that key to null, and `reward.num_workers=1`, as the asynchronous
topologies do.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import NonTensorData, TensorDict
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_recipes.settings.configuration import gpus_of

logger = logging.getLogger(__name__)


def rows_of(batch: TensorDict) -> list[dict[str, Any]]:
    """A batch as one dictionary a row; a value of the whole batch is repeated in every row."""
    columns = {
        key: [value.data] * len(batch) if isinstance(value, NonTensorData) else [getattr(v, "data", v) for v in value]
        for key, value in batch.items()
    }
    return [{key: column[i] for key, column in columns.items()} for i in range(len(batch))]


class BatchRollout:
    """An agent-loop manager for verl's v1 trainers (verl.trainer.ppo.v1.AgentLoopManagerTQ)."""

    def __init__(self, config: DictConfig) -> None:
        rollout = config.actor_rollout_ref.rollout
        self.rollout, self.data = rollout, config.data
        train, alone = gpus_of(config)
        size = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
        replicas = (alone or train) // size
        # The names that verl gives its servers (vllm_async_server.py, vLLMReplica.launch_servers).
        self.servers = [ray.get_actor(f"vllm_server_{replica}_0") for replica in range(replicas)]
        self.rewards = RewardLoopWorker(config)
        self.tokenizer = self.rewards.input_tokenizer
        self.template = config.actor_rollout_ref.model.custom_chat_template  # null: the tokenizer's own
        self.thread = ThreadPoolExecutor(1)

    @classmethod
    def create(cls, config: DictConfig, **handles: Any) -> Self:
        """verl's constructor. The handles of verl's own clients and workers are not needed."""
        return cls(config)

    def sampling(self, validate: bool) -> dict[str, Any]:
        """Keyword arguments of vLLM's SamplingParams."""
        source = self.rollout.val_kwargs if validate else self.rollout
        greedy = validate and not source.do_sample
        return {
            "n": source.n,
            "temperature": 0.0 if greedy else source.temperature,
            "top_p": 1.0 if greedy else source.top_p,
            "top_k": -1 if greedy else source.top_k,
            "max_tokens": self.rollout.response_length,
            "ignore_eos": self.rollout.ignore_eos,
            "logprobs": 0,  # only that of the sampled token
        }

    def tokenize(self, row: dict[str, Any]) -> list[int]:
        """Token ids of a row's prompt, with the model's chat template."""
        options = {"chat_template": self.template, **self.data.apply_chat_template_kwargs}
        ids = self.tokenizer.apply_chat_template(
            list(row["raw_prompt"]), add_generation_prompt=True, tokenize=True, return_dict=False, **options
        )
        if len(ids) > self.rollout.prompt_length:
            raise ValueError(
                f"a prompt has {len(ids)} tokens, more than data.max_prompt_length={self.rollout.prompt_length}; "
                "raise that, or set data.filter_overlong_prompts=True"
            )
        return ids

    def generate_sequences(self, batch: TensorDict) -> None:
        """Start to answer every prompt of a batch; returns at once."""
        rows = rows_of(batch)
        validate, *_ = [row.pop("validate", False) for row in rows]
        self.answering = self.thread.submit(self.run, rows, "val" if validate else "train")

    def wait(self) -> None:
        """Wait until every prompt so far is answered. The replay buffer calls it, as polling slows the engines down."""
        self.answering.result()

    def run(self, rows: list[dict[str, Any]], partition: str) -> None:
        """Answer, and mark the prompts as finished or as failed, as verl's agent loop does."""
        try:
            self.answer(rows, partition)
            status = "finished"
        except Exception:
            logger.exception("rollouts failed")  # the trainer then ends, as it has nothing to train on
            status = "failure"
        uids = [row["uid"] for row in rows]
        tq.kv_batch_put(keys=uids, tags=[{"status": status}] * len(uids), partition_id=partition)

    def answer(self, rows: list[dict[str, Any]], partition: str) -> None:
        """Answer every row and put the scored responses into TransferQueue."""
        prompts = [self.tokenize(row) for row in rows]
        common, count = self.sampling(partition == "val"), len(self.servers)
        # As verl_recipes/in_verl/row_sampling.py.
        sampling = [common | row["extra_info"].get("sampling", {}) for row in rows]
        calls = (s.generate_batch.remote(prompts[i::count], sampling[i::count]) for i, s in enumerate(self.servers))
        shares = ray.get(list(calls))
        keys, fields, tags = [], [], []
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            groups, version = shares[i % count]
            for session, (response, log_probs) in enumerate(groups[i // count]):
                keys.append(f"{row['uid']}_{session}_0")
                fields.append(self.fields(row, prompt, response, log_probs, version))
                tags.append(self.tags(row, prompt, response, version))
        for field, verdict in zip(fields, self.rewards.loop.run_until_complete(self.score(fields)), strict=True):
            field["rm_scores"] = torch.zeros(len(field["responses"]))
            field["rm_scores"][-1] = verdict["reward_score"]
            field["extra_fields"]["reward_extra_info"] = verdict["reward_extra_info"]
        tq.kv_batch_put(keys=keys, fields=list_of_dict_to_tensordict(fields), tags=tags, partition_id=partition)

    def fields(
        self, row: dict[str, Any], prompt: list[int], response: list[int], log_probs: list[float], version: int
    ) -> dict[str, Any]:
        """What verl's agent loop puts into TransferQueue for one response (agent_loop_tq.py), without the reward."""
        mask = torch.ones(len(response), dtype=torch.int64)
        return row | {
            "prompts": torch.tensor(prompt),
            "responses": torch.tensor(response),
            "response_mask": mask,
            "loss_mask": mask,
            "rollout_log_probs": torch.tensor(log_probs),
            "input_ids": torch.tensor(prompt + response),
            "position_ids": torch.arange(len(prompt) + len(response)),
            "multi_modal_inputs": {},
            "num_turns": 2,
            "extra_fields": {"min_global_steps": version, "max_global_steps": version},
        }

    def tags(self, row: dict[str, Any], prompt: list[int], response: list[int], version: int) -> dict[str, Any]:
        """What verl's replay buffer and trainer read without fetching the response (agent_loop_tq.py)."""
        return {
            "status": "success",
            "prompt_len": len(prompt),
            "response_len": len(response),
            "seq_len": len(prompt) + len(response),
            "global_steps": row["global_steps"],
            "min_global_steps": version,
            "max_global_steps": version,
        }

    async def score(self, fields: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The verdicts of verl's reward worker, in order."""

        def one(field: dict[str, Any]) -> DataProto:
            tensors = {name: field[name][None] for name in ("prompts", "responses", "input_ids", "position_ids")}
            tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
            others = {k: [v] for k, v in field.items() if not isinstance(v, torch.Tensor)}
            return DataProto.from_dict(tensors, non_tensors=others)

        return await asyncio.gather(*(self.rewards.compute_score(one(field)) for field in fields))
