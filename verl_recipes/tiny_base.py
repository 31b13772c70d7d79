"""python -m verl_recipes.tiny_base [out=runs/tiny_base]: makes the tiny base model that the CPU run trains.

A Qwen2 of half a million parameters that plays Countdown badly on purpose. It is taught, by transformers' Trainer, to
try one candidate a line and to check it, on traces like this (after the project's prompt, which ends with "<think>"):

    11+18=29,29-25=4 no
    17*3=51,51+19=70 yes</think>
    <answer> (17*3)+19 </answer>

In the last stage it is taught to give up at random after a wrong candidate and to answer with it. So it knows how to
search but lacks persistence, which reinforcement learning then has to find (assets/tiny_base/README.md says what that
shows and what it does not). Only number multisets of the training split are used.

    python -m verl_recipes.tiny_base                                                   as the shipped one was made
    python -m verl_recipes.tiny_base init=assets/tiny_base out=my_base '~stages.search' stages.give_up.steps=1000

Three things make half a million parameters enough:
- Numbers 10-199 are one token each, and their embeddings start as sine and cosine features of the number.
- The prompt's fixed phrases are one token each, so that reading the prompt costs 13 tokens and not 132.
- Clean traces come before those that give up: arithmetic accuracy sets the ceiling of everything later.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from data_prep.cli import Checked, Count, PathText, Positive, Seed, Share, UserError, command
from data_prep.generate import distinct
from data_prep.prompts import fill
from data_prep.schema import Preset, Prompt
from data_prep.search import Whole, expression, steps_between
from data_prep.split import TRAIN
from verl_recipes.bases.making import make_model, make_new, make_tokenizer, save

if TYPE_CHECKING:  # its import takes seconds, and only training needs it
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

LARGEST = 199  # the largest number with a token of its own: twice the largest intermediate result, less one
SOLUTION = 0.1  # probability that a candidate is chosen among the solutions; chance finds some more
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
RESPONSE = 256  # tokens of the longest response, as in configs/model/tiny.yaml
SLOPPY = 0.06  # share of malformed answers in the last stage, so that the format is left to learn too


class Stage(Checked):
    steps: Count
    batch: Count
    lr: Positive
    stop: Share
    most: Count


class Keys(Checked):
    preset: Preset
    prompt: Prompt
    out: PathText = Field(description="the model's folder, a new one; the shipped model is assets/tiny_base")
    init: PathText | None = Field(description="a tiny base to continue from, instead of an untrained model")
    seed: Seed = Field(description="of the problems, the traces and the training")
    problems: Count = Field(description="problems of the preset, from the training side")
    held_out_share: Annotated[Share, Field(lt=1)] = Field(
        description="share of the problems that is held out; as in prepare.yaml"
    )
    stages: dict[str, Stage] = Field(
        description="steps, batch and lr (linear decay over the last 70%); stop: probability of giving up after a "
        "wrong candidate; most: the most candidates in a trace"
    )


@cache
def candidates(numbers: tuple[int, ...], max_value: int) -> list[tuple[Whole, Whole]]:
    """Every way to use the three numbers once in two steps with results in 0..max_value."""
    return [
        (inner, outer)
        for first, second, third in permutations(numbers)
        for inner in steps_between(first, second, max_value)
        for left, right in ((inner[3], third), (third, inner[3]))
        for outer in steps_between(left, right, max_value)
    ]


def trace(numbers: list[int], target: int, *, stop: float, most: int, max_value: int, rng: random.Random) -> str:
    """A response to a problem, for the base model to learn.

    Args:
        numbers: three.
        stop: probability of giving up after a wrong candidate, by answering with it.
        most: the most candidates; after them the trace gives up too.
        max_value: the largest intermediate result.
        rng: for all choices.
    """
    tries = candidates(tuple(sorted(numbers)), max_value)
    solutions = [steps for steps in tries if steps[-1][3] == target]
    lines: list[str] = []
    while True:
        steps = rng.choice(solutions if rng.random() < SOLUTION else tries)
        right = steps[-1][3] == target
        lines.append(",".join(f"{a}{op}{b}={value}" for a, op, b, value in steps) + (" yes" if right else " no"))
        if right or len(lines) == most or rng.random() < stop:
            break
    answer = expression(steps, blank="", sparing=False)
    if stop and rng.random() < SLOPPY:
        answer = rng.choice([answer.replace("(", "", 1), answer.split(")")[0], answer + ")"])
    return "\n".join(lines) + f"</think>\n<answer> {answer} </answer>"


def rows(cfg: DictConfig, stage: DictConfig, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, list[int]]]:
    """An endless stream of tokenised prompts with traces, where only the trace counts for the loss."""
    seed = cfg.seed + stage.steps
    rng = random.Random(seed)
    preset: dict[str, Any] = OmegaConf.to_container(cfg.preset)  # type: ignore[assignment]
    numbers, _, targets = distinct(preset, cfg.problems, seed, side=TRAIN, held_out_share=cfg.held_out_share)
    problems = list(zip(numbers[:, :3].tolist(), targets.tolist(), strict=True))

    def row() -> dict[str, list[int]]:
        problem = rng.choice(problems)
        prompt = tokenizer(fill(cfg.prompt.messages[0].content, *problem))["input_ids"]
        text = trace(*problem, stop=stage.stop, most=stage.most, max_value=cfg.preset.max_intermediate, rng=rng)
        response = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}

    while True:  # pools of 32 batches, sorted by length, so that a batch holds little padding
        pool = sorted((row() for _ in range(32 * stage.batch)), key=lambda each: len(each["labels"]))
        batches = [pool[i : i + stage.batch] for i in range(0, len(pool), stage.batch)]
        rng.shuffle(batches)
        yield from (each for batch in batches for each in batch)


def train(cfg: DictConfig, stage: DictConfig, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """One stage of the warm start, by transformers' Trainer: constant learning rate, then linear decay to 0."""
    from torch.utils.data import IterableDataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, list[int]]]:
            return rows(cfg, stage, tokenizer)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch,
            learning_rate=stage.lr,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": int(0.7 * stage.steps), "decay_type": "linear"},
            warmup_steps=20,
            adam_beta2=0.98,
            weight_decay=0.01,
            max_grad_norm=1.0,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=cfg.seed,
        )
        Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), Stream()).train()


def make(cfg: DictConfig, folder: Path) -> None:
    """Train the model stage by stage, and save it."""
    from transformers import AutoTokenizer, Qwen2ForCausalLM, set_seed

    set_seed(cfg.seed)
    if cfg.init:
        tokenizer = AutoTokenizer.from_pretrained(cfg.init)
        model = Qwen2ForCausalLM.from_pretrained(cfg.init)
    else:
        text = cfg.prompt.messages[0].content
        phrases = [phrase for part in text.split("{numbers}") for phrase in part.split("{target}")]
        tokenizer = make_tokenizer([" yes", " no"], LARGEST, cfg.prompt.chat_template, phrases)
        model = make_model(tokenizer, LARGEST, SHAPE["hidden_size"], **SHAPE)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    for name, stage in cfg.stages.items():
        print(f"stage {name}: {OmegaConf.to_container(stage)}")
        train(cfg, stage, model, tokenizer)
    save(model, tokenizer, folder, RESPONSE)


@command("tiny_base", Keys)
def main(cfg: DictConfig) -> None:
    if cfg.init and not (Path(cfg.init) / "config.json").is_file():
        raise UserError(f"init={cfg.init} holds no model: a folder that this command wrote is expected")
    if len(cfg.prompt.messages) > 1 or "{numbers}" not in cfg.prompt.messages[0].content:
        raise UserError(f"prompt={cfg.prompt.name}: a prompt of one message with the problem is needed")
    if list(cfg.preset.count) != [3] or cfg.preset.max_intermediate is None:
        raise UserError(f"preset={cfg.preset.name}: problems of three numbers with a max_intermediate are needed")
    make_new(cfg.out, partial(make, cfg))


if __name__ == "__main__":
    main()
