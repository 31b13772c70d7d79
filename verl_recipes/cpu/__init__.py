"""verl 0.9.1 on a CPU, unmodified: `VERL_PLATFORM=cpu python -m verl.trainer.main_ppo ...` with this package installed.

verl imports this module in every process, by the `verl.plugins` entry point. It registers the platform and the
process-group backend at once. It registers the training engines, the rollout replica and the weight transfer only when
verl loads the registry for them, so a process imports only what it needs.

Imports in_verl/, planning/ and settings/.
"""

import os
import signal
from multiprocessing import resource_tracker
from typing import Any

import verl_recipes.in_verl  # noqa: F401  what it registers is registered before what this module puts in its place
from verl_recipes.cpu import platform  # noqa: F401  registers the platform `cpu`

# A run's processes block SIGTERM (run/supervise.py). Python before 3.13 unblocks it, besides SIGINT, in a process that
# starts the tracker of shared memory.
resource_tracker._IGNORED_SIGNALS = (signal.SIGINT,)  # type: ignore[attr-defined]

if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    import wrapt

    @wrapt.when_imported("verl.workers.engine")
    def _register_engines(module: object) -> None:
        from verl_recipes.cpu import engine  # noqa: F401

    @wrapt.when_imported("verl.workers.rollout.replica")
    def _register_replica(module: Any) -> None:
        def load_replica() -> Any:
            from verl_recipes.cpu.vllm_server import CPUReplica  # only when verl needs a replica: it imports vLLM

            return CPUReplica

        module.RolloutReplicaRegistry.register("vllm", load_replica)

    @wrapt.when_imported("verl.workers.rollout.base")
    def _register_sender(module: Any) -> None:
        module._ROLLOUT_REGISTRY["vllm", "async"] = "verl_recipes.cpu.weight_socket.CPUServerAdapter"

    @wrapt.when_imported("verl.checkpoint_engine")
    def _register_transfer(module: object) -> None:
        from verl_recipes.cpu import weight_transfer  # noqa: F401
