"""All that reaches into verl's trainer (0.9.1) from the replay buffer, to which verl gives no reference.

tests/test_trainer_link.py fails if verl changes one of these names.
"""

from collections.abc import Callable, Mapping
from typing import Any


class TrainerLink:
    """verl's trainer (verl.trainer.ppo.v1.trainer_base.PPOTrainer), as the replay buffer of it sees it."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """From the keyword arguments that verl gives a replay buffer: `refill_fn` is a method of the trainer."""
        self.trainer = arguments["refill_fn"].__self__

    def wait_for_rollouts(self) -> None:
        """Until all prompts so far are answered, if the rollouts are a batch (cpu/batch_rollout.py)."""
        wait: Callable[[], None] | None = getattr(self.trainer.agent_loop_manager, "wait", None)
        if wait:
            wait()

    def save_this_step(self) -> None:
        """Have the trainer save after the step that it is in: it reads `save_freq` after each."""
        self.trainer.config.trainer.save_freq = 1

    def is_saved(self) -> bool:
        """Whether the step before was saved because of `save_this_step`, or as every step is."""
        return bool(self.trainer.config.trainer.save_freq == 1)

    def stop(self) -> None:
        """End verl."""
        raise RuntimeError("ended by SIGTERM, after a checkpoint")
