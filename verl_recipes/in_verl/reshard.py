"""A checkpoint of another number of ranks: each rank takes its part of every tensor.

verl 0.9.1's FSDP2 engine reads only files of its own number of ranks. Here each rank writes those that verl would have
saved into a temporary folder, and verl loads them. Their tensors come from all files of the checkpoint, mapped into
memory and not read whole.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from verl_recipes.in_verl.agreement import Engine
from verl_recipes.run.checkpoints import RESHARDED, ranks_of


def whole(parts: Sequence[Any]) -> Any:
    """A tensor, from the DTensors that all ranks saved of it; anything else is equal on all ranks."""
    if not isinstance(parts[0], DTensor):
        return parts[0]
    (placement,) = parts[0].placements
    local = [part._local_tensor for part in parts]
    return torch.cat(local, placement.dim) if isinstance(placement, Shard) else local[0]


def part(value: Any, like: Any) -> Any:
    """This rank's part of a tensor, placed as the DTensor `like`; anything that is not of its shape as it is."""
    if not (isinstance(like, DTensor) and isinstance(value, torch.Tensor) and value.shape == like.shape):
        return value
    (placement,), mesh, local = like.placements, like.device_mesh, value
    if isinstance(placement, Shard):  # as FSDP2 does; the last ranks may have none
        chunks, rank = value.chunk(mesh.size(), placement.dim), mesh.get_local_rank()
        local = chunks[rank] if rank < len(chunks) else value.narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        local.clone(), mesh, like.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def reshard(saved: Path, target: Path, module: torch.nn.Module, optimizer: Any, rank: int, ranks: int) -> None:
    """Write this rank's files of a checkpoint that another number of ranks saved.

    Args:
        saved: the folder with model, optimizer and extra state of each of those ranks.
        target: an empty folder.
        module, optimizer: the sharded model and its optimizer, None if there is none.
    """
    before = ranks_of(saved)

    def read(kind: str) -> list[Any]:
        names = (saved / f"{kind}_world_size_{before}_rank_{each}.pt" for each in range(before))
        return [torch.load(name, map_location="cpu", mmap=True, weights_only=False) for name in names]

    def write(kind: str, state: Any) -> None:
        torch.save(state, target / f"{kind}_world_size_{ranks}_rank_{rank}.pt")

    models, here = read("model"), module.state_dict()
    write("model", {name: part(whole([each[name] for each in models]), here[name]) for name in models[0]})
    if optimizer is not None:
        states = read("optim")
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            i: {name: part(whole([each["state"][i][name] for each in states]), parameters[i]) for name in known}
            for i, known in states[0]["state"].items()
        }
        write("optim", states[0] | {"state": state})
    extra = f"extra_state_world_size_{before}_rank_{rank % before}.pt"  # the schedule, and random numbers' state
    shutil.copy(saved / extra, target / f"extra_state_world_size_{ranks}_rank_{rank}.pt")


def lacks_room(module: torch.nn.Module) -> bool:
    """Whether this rank's GPU has no room for two copies of the module's shard."""
    if not torch.cuda.is_available():
        return False
    shards = (getattr(each, "_local_tensor", each) for each in module.parameters())
    return torch.cuda.mem_get_info()[0] < 2 * sum(each.numel() * each.element_size() for each in shards)


class Resharding(Engine):
    """Added to an engine that trains: it takes up a checkpoint of any number of ranks."""

    _is_offload_param: bool

    def load(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """As verl's. But verl brings offloaded weights to the GPU first, where the file's tensors come too."""
        offloads = self._is_offload_param
        self._is_offload_param = offloads and not (self._is_offload_optimizer and lacks_room(self.module))
        try:
            super().load_checkpoint(local_path, *args, **kwargs)
        finally:
            self._is_offload_param = offloads

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if not local_path or ranks_of(Path(local_path)) in (0, ranks):
            return self.load(local_path, *args, **kwargs)
        # Where a checkpoint has room; a run's temporary folder may be in memory.
        with TemporaryDirectory(dir=Path(local_path).parent.parent, prefix=RESHARDED) as folder:
            reshard(Path(local_path), Path(folder), self.module, self.optimizer, rank, ranks)
            return self.load(folder, *args, **kwargs)
