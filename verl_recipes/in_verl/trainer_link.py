"""Everything that the replay buffer does with verl's trainer (0.9.1), to which verl gives it no reference.

tests/test_trainer_link.py fails if verl changes one of these names.
"""

from collections.abc import Callable, Mapping
from typing import Any

UNSHIELDED = ("console", "file")  # verl's own, which a run cannot do without


class Tracker:
    """One of verl's trackers, or one of its tables (samples, dropped groups), which verl sends to every tracker.

    If it fails, it misses a step; verl alone would end the run, before the next checkpoint.

    wandb's service is such a case: it ends on the SIGTERM that a scheduler sends to every process.
    """

    def __init__(self, name: str, tracker: Any) -> None:
        self.name, self.tracker = name, tracker

    def log(self, *arguments: Any, **named: Any) -> None:
        """The step comes last, or by name."""
        try:
            self.tracker.log(*arguments, **named)
        except Exception as error:  # whatever its package raises
            print(f"{self.name} misses step {[*arguments, *named.values()][-1]}: {error!r}", flush=True)

    def finish(self, **arguments: Any) -> None:
        """Not shielded: no step comes after it, and the command reports what fails here (run/start.py)."""
        self.tracker.finish(**arguments)


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

    def shield_trackers(self) -> None:
        """Let no tracker end the run."""
        trackers: dict[str, Any] = self.trainer.logger.logger
        for name, tracker in trackers.items():
            if name not in UNSHIELDED and not isinstance(tracker, Tracker):
                trackers[name] = Tracker(name, tracker)
        for name in ("validation_generations_logger", "dapo_filtered_reward_logger"):
            if not isinstance(table := getattr(self.trainer, name, None), Tracker | None):
                setattr(self.trainer, name, Tracker(name, table))

    def learn(self, rows: list[dict[str, Any]]) -> None:
        """Tell the curriculum, if there is one, how a training step's samples came out (in_verl/dataset.py)."""
        dataset = self.trainer.train_dataset
        if hasattr(dataset, "learn"):
            dataset.learn(rows)

    def responses_to(self, prompts: int) -> int:
        """How many responses so many prompts of a training step get."""
        return int(prompts * self.trainer.config.actor_rollout_ref.rollout.n)

    def trusts_remote_code(self) -> bool:
        """Whether the model may bring code, as verl's workers ask."""
        return bool(self.trainer.config.actor_rollout_ref.model.trust_remote_code)

    def refills_failed_groups(self) -> bool:
        """verl's own key, which it gives to its own replay buffers alone."""
        return bool(self.trainer.config.trainer.v1.sampler.sync_refill_failed_groups)

    def save_this_step(self) -> None:
        """Make the trainer save after the present step: it reads `save_freq` after each step."""
        self.trainer.config.trainer.save_freq = 1

    def is_saved(self, split: str) -> bool:
        """Whether what was trained so far is saved, because of `save_this_step` or because every step is.

        With topology=split a training step has several batches, and is saved after the last of them.
        """
        within = split == "train" and self.trainer.local_trigger_step > 0
        return bool(self.trainer.config.trainer.save_freq == 1 and not within)

    def stop(self, why: str) -> None:
        raise RuntimeError(f"ended {why}")
