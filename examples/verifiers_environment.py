"""The problems and the reward as an environment of verifiers: a taskset that `vf-eval` and prime-rl load by name.

docs/other_trainers.md says how to install verifiers, how to serve the tiny model for it, and the command.
"""

from collections.abc import Iterable

import pyarrow.parquet as pq
import verifiers.v1 as vf

from reward_score.countdown import compute_score

__all__ = ["CountdownTaskset"]


class CountdownData(vf.TaskData):
    """A problem."""

    source: str
    numbers: list[int]
    target: int


class CountdownTask(vf.Task[CountdownData]):
    """Scores the last reply to the problem."""

    @vf.reward(weight=1.0)
    async def countdown(self, trace: vf.Trace) -> float:
        """1 if right, 0.1 if well formed but wrong, else 0."""
        truth = {"numbers": self.data.numbers, "target": self.data.target}
        return compute_score(self.data.source, trace.last_reply, truth)["score"]


class CountdownConfig(vf.TasksetConfig):
    """--env.taskset.file: a parquet file of `python -m data_prep`."""

    file: str = "data/tiny/test.parquet"


class CountdownTaskset(vf.Taskset[CountdownTask, CountdownConfig]):
    """A task for each row of the file."""

    def load(self) -> Iterable[CountdownTask]:
        """In the order of the file."""
        for row in pq.read_table(self.config.file).to_pylist():
            prompt, truth = row["prompt"][-1]["content"], row["reward_model"]["ground_truth"]
            yield CountdownTask(CountdownData(prompt=prompt, source=row["data_source"], **truth), self.config.task)
