"""verl's data set with a curriculum (configs/curriculum/).

verl 0.9.1's trainer makes its sampler itself, but takes the class of its data set (`data.custom_cls`), and its data
loader saves and restores what such a data set's `state_dict` holds.
"""

from collections.abc import Mapping
from typing import Any

from verl.utils.dataset.rl_dataset import RLHFDataset

from data_prep.cli import as_list
from verl_recipes.in_verl.curriculum import Curriculum


class CurriculumDataset(RLHFDataset):
    """Gives the curriculum's next problem whatever number it is asked for; the test problems come as they are."""

    def __init__(self, data_files: Any, tokenizer: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(data_files, tokenizer, config, *args, **kwargs)
        self.curriculum = None
        if as_list(data_files) == as_list(config.train_files):
            settings = config.curriculum
            difficulty = [row["difficulty"] for row in self.dataframe["extra_info"]]
            draws = settings.steps * config.train_batch_size
            self.curriculum = Curriculum(difficulty, settings.order, settings.seed, draws)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return super().__getitem__(self.curriculum.next() if self.curriculum else item)

    def learn(self, rows: list[dict[str, Any]]) -> None:
        """Take note of a training step's samples (in_verl/sampler.py)."""
        if self.curriculum:
            self.curriculum.learn((row["extra_info"]["difficulty"], row["acc"]) for row in rows)

    def state_dict(self) -> dict[str, Any]:
        return self.curriculum.state() if self.curriculum else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.curriculum:
            self.curriculum.restore(state)
