"""Weights from the trainer to vLLM servers on ranks of their own, over gloo: verl's checkpoint engine `gloo`.

verl 0.9.1's own engines (nccl, nixl, ...) need an accelerator. On a CPU, `topology=split` uses this one
(configs/hardware/cpu.yaml). Every transfer makes a new process group, which takes milliseconds on one machine.
"""

import pickle
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import ray
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from verl_recipes.in_verl import sampling

TIMEOUT = timedelta(minutes=5)
Weights = Iterator[tuple[str, torch.Tensor]]


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Rank 0 of the trainer broadcasts each tensor to all rollout ranks."""

    def __init__(self, bucket_size: int, is_master: bool = False, top_p: float = 1.0, top_k: int = -1) -> None:
        """top_p and top_k are those of training; `engine_kwargs` in configs/topology/split.yaml passes them."""
        self.is_master = is_master
        sampling.note(top_p, top_k)

    def prepare(self) -> tuple[str, int] | None:
        """The address of the master's store, to which the others connect."""
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address()
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return host, self.store.port

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Rank 0 for the first trainer rank, -1 for the other trainer ranks, and 1, 2, ... for the rollout ranks."""

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            size = len(ranks)
            return {"rank": ranks, "world_size": [1 + rollout_world_size] * size, "master": [metadata[0]] * size}

        return arguments([0] + [-1] * (actor_wg_world_size - 1)), arguments(list(range(1, 1 + rollout_world_size)))

    def init_process_group(self, rank: int, world_size: int, master: tuple[str, int]) -> None:
        self.rank = rank
        if rank < 0:
            return
        if not self.is_master:
            self.store = TCPStore(*master, is_master=False, timeout=TIMEOUT)
        self.group: Any = ProcessGroupGloo(PrefixStore("weights", self.store), rank, world_size, TIMEOUT)

    def finalize(self) -> None:
        self.__dict__.pop("group", None)
        self.__dict__.pop("store", None)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fill every rank's tensor with that of rank 0."""
        self.group.broadcast(tensor, 0).wait()
        return tensor

    def broadcast_object(self, value: Any = None) -> Any:
        """The object of rank 0, which should be small."""
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        size = self.broadcast(torch.tensor([len(data)]))
        received = self.broadcast(data if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8))
        return pickle.loads(bytes(received.tolist()))

    @torch.no_grad()
    async def send_weights(self, weights: Weights, global_steps: int | None = None) -> None:
        """Broadcast the weights. Ranks that do not send still produce theirs, as producing a tensor is collective."""
        for name, weight in weights:
            if self.rank == 0:
                self.broadcast_object((name, weight.shape, weight.dtype))
                self.broadcast(weight.contiguous())
        if self.rank == 0:
            self.broadcast_object()

    @torch.no_grad()
    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        while header := self.broadcast_object():
            name, shape, dtype = header
            yield name, self.broadcast(torch.empty(shape, dtype=dtype))
