"""Everything that the replay buffer does with verl's trainer (0.9.1), to which verl gives it no reference.

tests/test_trainer_link.py fails if verl changes one of these names.
"""

from collections.abc import Callable, Mapping
from typing import Any


class TrainerLink:
    """verl's trainer (verl.trainer.ppo.v1.trainer_base.PPOTrainer), as its replay buffer sees it."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """`arguments` are the keywords that verl gives a replay buffer: `refill_fn` is a method of the trainer."""
        self.trainer = arguments["refill_fn"].__self__

    def wait_for_rollouts(self) -> None:
        """Wait until all prompts so far are answered, if the rollouts are one batch (cpu/batch_rollout.py)."""
        wait: Callable[[], None] | None = getattr(self.trainer.agent_loop_manager, "wait", None)
        if wait:
            wait()

    def save_this_step(self) -> None:
        """Make the trainer save after the present step: it reads `save_freq` after each step."""
        self.trainer.config.trainer.save_freq = 1

    def is_saved(self) -> bool:
        """Whether the previous step was saved, because of `save_this_step` or because every step is."""
        return bool(self.trainer.config.trainer.save_freq == 1)

    def stop(self) -> None:
        """End verl."""
        raise RuntimeError("ended by SIGTERM, after a checkpoint")
