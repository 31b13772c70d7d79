"""The reward as a function for TRL's GRPOTrainer, and two steps of GRPO on the tiny model with it.

    PYTHONPATH=. .venv-trl/bin/python examples/trl_reward.py [steps [folder]]

docs/other_trainers.md says how to make the environment.
"""

import sys
from typing import Any

from datasets_loader import chat_template, load_countdown
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from reward_score.countdown import compute_score


def countdown_reward(
    completions: list[Any], data_source: list[str], numbers: list[list[int]], target: list[int], **_: Any
) -> list[float]:
    """A score for each completion; TRL passes the columns of the dataset by name, one value a completion."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]  # text, or messages
    rows = zip(data_source, texts, numbers, target, strict=True)
    return [compute_score(source, text, {"numbers": n, "target": t})["score"] for source, text, n, t in rows]


def main(steps: str = "2", folder: str = "data/tiny") -> None:
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny_base")
    tokenizer.chat_template = chat_template(folder)
    settings = GRPOConfig(
        output_dir="runs/trl_example",
        max_steps=int(steps),
        per_device_train_batch_size=64,  # 8 prompts
        num_generations=8,
        max_completion_length=256,
        learning_rate=0.15,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    train = load_countdown(folder)["train"]
    GRPOTrainer("assets/tiny_base", countdown_reward, settings, train, processing_class=tokenizer).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
