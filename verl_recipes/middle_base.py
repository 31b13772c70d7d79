"""python -m verl_recipes.middle_base [traces=FOLDER] [out=models/middle]: makes the base model of the middle rung.

A Qwen2 of five million parameters that stands to the game as a pretrained model does: it reads the prompt in full, word
by word, has done many sums, and has seen problems that were solved at once. It does not search. A warm start teaches it
that (docs/warm_start.md has the commands and what came of them), or reinforcement learning has to find it.

    python -m data_prep preset=3to4 ... out=data/middle
    python -m data_prep.traces data=data/middle out=data/middle-direct styles.first_try=1 styles.search=0 ...
    python -m verl_recipes.middle_base traces=data/middle-direct
    python -m verl_recipes.middle_base traces=data/middle-direct steps=200 out=runs/try       a quick look

Numbers up to 999 are one token each, as Llama 3 has them, and their embeddings start as sine and cosine features of the
number, which pretrained models were found to have (arXiv 2406.03445).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from pydantic import Field

from data_prep.cli import Checked, Count, PathText, Positive, Seed, Share, UserError, command
from data_prep.search import after, random_step
from data_prep.wording import PHRASES, SCALE, written
from verl_recipes.bases.making import Row, in_batches, make_model, make_new, make_tokenizer, save, train

if TYPE_CHECKING:  # its import takes seconds, and only training needs it
    from transformers import PreTrainedTokenizerFast

LARGEST = 999  # the largest number with a token of its own
NUMBERS = range(1, 100)  # of the problems
STEPS = 10  # in a text of walks, at least
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
RESPONSE = 384  # tokens of the longest response, as in configs/model/middle.yaml


class Keys(Checked):
    out: PathText = Field(description="the model's folder, a new one")
    traces: PathText = Field(description="a folder of data_prep.traces, of problems that are solved at once")
    seed: Seed = Field(description="of the texts and the training")
    steps: Count = Field(description="of the training")
    batch: Count = Field(description="texts a step")
    lr: Positive = Field(description="learning rate, with linear decay over the last 70% of the steps")
    walks: Share = Field(description="share of the texts that are walks through the game without a target")


def walks(rng: random.Random) -> str:
    """Walks through the game without a target: what is left, a step on two of it, and so on until one number is left."""
    said: list[str] = []
    while len(said) < STEPS:
        pool = rng.sample(NUMBERS, rng.choice((3, 4)))
        while len(pool) > 1 and (step := random_step(pool, SCALE * NUMBERS[-1], set(), rng)):
            said.append(f"Left: {', '.join(map(str, pool))}. {written(step)}.")
            pool = after(pool, step)
    return " ".join(said)


def words(texts: Iterable[str]) -> list[str]:
    """The words and marks of texts, each with the blank before it; twice, as once makes no token."""
    return 2 * sorted({word for text in texts for word in re.findall(r" ?[^\W\d]+| ?[^\w\s]+|\n", text)})


def make(cfg: DictConfig, folder: Path) -> None:
    """Train the model and save it."""
    import pyarrow.parquet as pq
    from transformers import set_seed

    set_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    rows = pq.read_table(f"{cfg.traces}/train.parquet", columns=["messages"])["messages"].to_pylist()
    pairs = [(row[0]["content"], row[-1]["content"]) for row in rows]
    tokenizer = make_tokenizer(words(chain(*pairs, *PHRASES["en"].values())), LARGEST, "{{ messages[-1]['content'] }}")
    model = make_model(tokenizer, LARGEST, **SHAPE)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(pairs):,} solved problems")
    tokens = [tokenizer([pair[side] for pair in pairs])["input_ids"] for side in (0, 1)]

    def sample() -> Row:
        if rng.random() < cfg.walks:
            ids = tokenizer(walks(rng))["input_ids"]
            return {"input_ids": ids, "labels": ids}
        number = rng.randrange(len(pairs))
        prompt, response = tokens[0][number], tokens[1][number] + [tokenizer.eos_token_id]
        return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}

    stage = {"steps": cfg.steps, "batch": cfg.batch, "lr": cfg.lr, "seed": cfg.seed, "bf16": True}
    train(model, tokenizer, in_batches(sample, cfg.batch, rng), **stage)
    save(model, tokenizer, folder, RESPONSE)


@command("middle_base", Keys)
def main(cfg: DictConfig) -> None:
    if not Path(cfg.traces, "train.parquet").is_file():
        raise UserError(
            f"traces={cfg.traces} has no train.parquet; `python -m data_prep.traces out={cfg.traces}` makes it"
        )
    make_new(cfg.out, partial(make, cfg))


if __name__ == "__main__":
    main()
