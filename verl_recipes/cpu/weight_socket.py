"""How a training rank sends new weights to its vLLM engine: by the run's own socket, and tensors in pieces.

Without a GPU, verl sends weights through shared memory, and no tensor may be larger than its bucket. A real model's
embedding is larger: 113 MB for SmolLM2-135M. So such a tensor is sent in pieces, and the bucket stays small enough for
the 64 MB of shared memory that a container has by default.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import torch
from verl.workers.rollout.utils import ensure_async_iterator

from verl_recipes.in_verl.weight_socket import OwnServerAdapter, own_address

PIECE = "/piece"  # the end of a piece's name; no parameter's name has a slash


async def in_pieces(weights: Any, size: int) -> AsyncIterator[tuple[str, torch.Tensor]]:
    """Tensors by name. One over `size` bytes comes as consecutive pieces, each as many rows as fit (at least one)."""
    async for name, weight in ensure_async_iterator(weights):
        if weight.nbytes <= size:
            yield name, weight
            continue
        for piece in weight.split(max(1, size * len(weight) // weight.nbytes)):
            yield name + PIECE, piece


def joined(received: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that `in_pieces` was given, joined one at a time."""
    pieces: dict[str, list[torch.Tensor]] = {}
    for name, weight in received:
        pieces.setdefault(name.removesuffix(PIECE), []).append(weight)
    for name, parts in pieces.items():
        yield name, parts[0] if len(parts) == 1 else torch.cat(parts)


class CPUServerAdapter(OwnServerAdapter):
    """verl's sender of weights. The worker in vLLM is always this project's (vllm_server.py)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.zmq_handle = own_address(self.zmq_handle)

    async def update_weights(self, weights: Any, *args: Any, **kwargs: Any) -> None:
        bucket = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        await super().update_weights(in_pieces(weights, bucket), *args, **kwargs)
