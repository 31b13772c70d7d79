"""python -m verl_recipes.in_verl.sft: verl's supervised trainer on Ray, on the traces of data_prep.traces.

verl's own entry (verl.trainer.sft_trainer_ray) starts Ray without settings. Here Ray starts as verl.trainer.main_ppo
starts it, and a checkpoint's weights lie in its `actor`, as those of the other trainer do.
"""

import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from data_prep.cli import as_list, compose


class Traces(Dataset[dict[str, torch.Tensor]]):
    """Prompts in the tokens that the rollout engine gets, each with a response and the end token, which are learned."""

    def __init__(
        self, parquet_files: Any, tokenizer: Any, config: DictConfig, processor: Any = None, max_samples: int = -1
    ) -> None:
        """Arguments as verl passes them. `config.max_length` bounds the tokens of a row."""
        columns = [pq.read_table(file, columns=["messages"])["messages"] for file in as_list(parquet_files)]
        messages = [row for column in columns for row in column.to_pylist()]
        # verl gives the run's template to the processor if the model has one, and to the tokenizer if not.
        template = (processor or tokenizer).chat_template
        options = {"chat_template": template, **config.get("apply_chat_template_kwargs", {})}
        prompts = tokenizer.apply_chat_template(
            [row[:-1] for row in messages], add_generation_prompt=True, tokenize=True, return_dict=False, **options
        )
        responses = tokenizer([row[-1]["content"] for row in messages], add_special_tokens=False)["input_ids"]
        pairs = zip(prompts, responses, strict=True)
        self.rows = [(prompt, [*response, tokenizer.eos_token_id]) for prompt, response in pairs]
        if long := [row for row in self.rows if len(row[0]) + len(row[1]) > config.max_length]:
            longest = max(len(prompt) + len(response) for prompt, response in long)
            raise ValueError(
                f"{len(long)} traces are longer than {config.max_length} tokens, the longest {longest}: make them anew "
                "with max_tokens=, or raise data.max_response_length"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        prompt, response = self.rows[number]
        return {
            "input_ids": torch.tensor(prompt + response),
            "position_ids": torch.arange(len(prompt) + len(response)),
            "loss_mask": torch.tensor([0] * len(prompt) + [1] * len(response)),
        }


class InActor:
    """Of the workers, what verl's handler of checkpoints calls, one folder deeper."""

    def __init__(self, workers: Any) -> None:
        self.workers = workers

    def save_checkpoint(self, local_path: str, **settings: Any) -> None:
        self.workers.save_checkpoint(local_path=f"{local_path}/actor", **settings)

    def load_checkpoint(self, path: str) -> None:
        self.workers.load_checkpoint(f"{path}/actor")


def main() -> None:
    """The arguments are those of verl.trainer.main_ppo: --config-path=, --config-name= and overrides."""
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env
    from verl.trainer.sft_trainer_ray import SFTTrainer

    class Trainer(SFTTrainer):
        def _build_dataloader(self) -> None:
            super()._build_dataloader()
            self.train_sampler.seed = self.config.trainer.seed  # verl's order is of seed 0

        def _build_ckpt_handler(self) -> None:
            super()._build_ckpt_handler()
            self.ckpt_handler.engine = InActor(self.training_client)

    folder, name, *overrides = sys.argv[1:]
    cfg = compose(name.partition("=")[2], overrides, folder=Path(folder.partition("=")[2]))
    settings: dict[str, Any] = OmegaConf.to_container(cfg.ray_kwargs.ray_init)  # type: ignore[assignment]
    environment = OmegaConf.merge(get_ppo_ray_runtime_env(), settings.pop("runtime_env", {}))
    ray.init(**settings, runtime_env=OmegaConf.to_container(environment))
    Trainer(cfg).fit()


if __name__ == "__main__":
    main()
