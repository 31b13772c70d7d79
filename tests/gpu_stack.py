"""A pytest plugin for tests/run.sh --gpu-stack: the vLLM of requirements/gpu.txt believes that there is a card.

It asks the driver which platform it is on, and its parser of options needs one. Whatever vLLM loads for CUDA by name
needs libcuda.so.1, which only a driver brings. So the platform has CUDA's device and no name.
"""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    import torch
    from vllm import platforms
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    if torch.cuda.is_available():
        return

    class Hopper(Platform):
        _enum = PlatformEnum.UNSPECIFIED
        device_name = device_type = "cuda"
        dispatch_key = "CUDA"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

    platforms._current_platform = Hopper()
