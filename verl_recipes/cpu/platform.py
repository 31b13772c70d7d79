"""The platform `cpu` for verl's registry (verl.plugin.platform), and the process-group backend that it needs."""

import os
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed
from verl.plugin.platform import PlatformBase, PlatformRegistry


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a CPU does for many of a GPU's functions."""


def _device_module() -> ModuleType:
    """`torch.cpu` with what verl also expects of `torch.cuda`: memory figures, and caches that do not exist."""
    module = ModuleType("verl_recipes.cpu.device")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in torch.cpu.__all__})

    def resident_bytes(device: Any = None) -> int:
        return int(psutil.Process().memory_info().rss)

    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, resident_bytes)
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"):
        setattr(module, name, _nothing)
    module.__dict__.update(
        get_device_name=lambda device=None: "CPU",  # a key of verl's table of FLOPS
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        mem_get_info=lambda device=None: psutil.virtual_memory()[1::-1],  # available, total
    )
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """One logical GPU of Ray's (`ray_kwargs.ray_init.num_gpus`) is one rank; all ranks share the CPU."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()
    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = _nothing
    cudart = _nothing
    nvtx_range = nullcontext

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # only if VERL_PLATFORM=cpu: the driver of a GPU cluster may run on a machine without a GPU

    def current_device(self) -> str:
        return "cpu"  # verl calls tensor.to(current_device()); torch would take an integer for CUDA

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"  # what Ray sets for its logical GPUs; nothing on a CPU reads it

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False  # verl then moves weights to the rollout engine through shared memory

    def rollout_env_vars(self) -> dict[str, str]:
        defaults = {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads of several engines would share one core
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else vLLM's CPU platform forces the multiprocess executor
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",  # vLLM's sampler would spend 30 s on compiling one small function
        }
        return {name: os.environ.get(name, value) for name, value in defaults.items()}


# verl/utils/distributed.py asks torch for the backend "cpu:gloo,{device}:{backend}", on a CPU "cpu:gloo,cpu:gloo",
# which torch refuses to parse ("Duplicate device type"). A registered backend of that very name is taken as it is.
torch.distributed.Backend.register_backend("cpu:gloo,cpu:gloo", torch.distributed.ProcessGroupGloo, devices=["cpu"])
