"""What runs inside verl's processes on any device: attention, training engines, replay buffer, alarms, evaluation.

verl imports this module in every process, by the `verl.plugins` entry point. It registers attention, engines, losses
and the sender of weights once transformers' and verl's registries are loaded, so that a process which needs none of
them imports neither. The rest verl loads by the names in configs/.

Imports run/, measure/ and settings/, data_prep and reward_score.
"""

from typing import Any

import wrapt


@wrapt.when_imported("transformers.modeling_utils")
def _register_attention(module: object) -> None:
    from verl_recipes.in_verl import attention

    attention.register()


@wrapt.when_imported("verl.workers.engine")
def _register_engines(module: object) -> None:
    from verl_recipes.in_verl import engines  # noqa: F401


@wrapt.when_imported("verl.trainer.ppo.core_algos")
def _register_losses(module: object) -> None:
    from verl_recipes.in_verl import losses  # noqa: F401


@wrapt.when_imported("verl.workers.rollout.base")
def _register_sender(module: Any) -> None:
    # A private name, as read in verl 0.9.1, which has no other way to this registry (tests/test_cpu_platform.py).
    module._ROLLOUT_REGISTRY["vllm", "async"] = "verl_recipes.in_verl.weight_socket.OwnServerAdapter"
