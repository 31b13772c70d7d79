"""A pytest plugin for tests/run.sh --gpu-stack: the vLLM of requirements/gpu.txt believes that there is a card.

It asks the driver which platform it is on, and without one its parser has no device. Nothing else of it is changed.
"""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    import torch
    from vllm import platforms

    if torch.cuda.is_available():
        return
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Hopper(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

    platforms._current_platform = Hopper()
