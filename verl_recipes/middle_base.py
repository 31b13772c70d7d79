"""python -m verl_recipes.middle_base [traces=FOLDER] [out=models/middle]: makes the base model of the middle rung.

A Qwen2 of five million parameters that stands to the game as a pretrained model does: it reads the prompt in full, word
by word, has done many sums, and has seen problems that were solved at once. It does not search. A warm start teaches it
that (docs/warm_start.md has the commands and what came of them), or reinforcement learning has to find it.

    python -m data_prep preset=3to4 ... out=data/middle
    python -m data_prep.traces data=data/middle out=data/middle-direct styles.first_try=1 styles.search=0 ...
    python -m verl_recipes.middle_base traces=data/middle-direct
    python -m verl_recipes.middle_base traces=data/middle-direct steps=200 out=runs/try       a quick look

Numbers up to 999 are one token each, as Llama 3 has them. Half of each one's embedding starts as sine and cosine
features of the number, which pretrained models were found to have (arXiv 2406.03445). The other half is random, so that
a number is easy to copy. Muon (https://kellerjordan.github.io/posts/muon) trains the matrices: it learns sums in half
of AdamW's steps (docs/log.md).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from pydantic import Field
from rich.progress import track

from data_prep.cli import Checked, Count, PathText, Positive, Seed, Share, UserError, command
from data_prep.search import after, random_step, steps_between
from data_prep.wording import PHRASES, SCALE, written
from verl_recipes.bases.making import make_model, make_new, make_tokenizer, save

if TYPE_CHECKING:  # these imports take seconds, and only training needs them
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

LARGEST = 999  # the largest number with a token of its own
NUMBERS = range(1, 100)  # of the problems
FAR = 600  # the largest left side of an equation
NUMBER_WEIGHT = 5  # of a number in the loss; a word has 1
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
RESPONSE = 384  # tokens of the longest response, as in configs/model/middle.yaml
Part = tuple[str, bool]  # of a text: whether it is learned


class Keys(Checked):
    out: PathText = Field(description="the model's folder, a new one")
    traces: PathText = Field(description="a folder of data_prep.traces, of problems that are solved at once")
    seed: Seed = Field(description="of the texts and the training")
    steps: Count = Field(description="of the training")
    rows: Count = Field(description="rows a step")
    length: Count = Field(description="tokens of a row, which holds several texts")
    lr: Positive = Field(description="learning rate, with linear decay over the last 70% of the steps")
    texts: dict[str, Share] = Field(description="the share of each kind of text; only the proportions count")


def equations(rng: random.Random) -> Iterator[Part]:
    """Twelve equations, of which the results are learned."""
    for _ in range(12):
        some: list[tuple[int, str, int, int]] = []
        while not some:
            pair = [rng.choice(NUMBERS) if rng.random() < 0.8 else rng.randint(1, FAR), rng.choice(NUMBERS)]
            a, b = rng.sample(pair, 2)
            some = steps_between(a, b, SCALE * NUMBERS[-1])
        equation, result = written(rng.choice(some)).rsplit(" ", 1)
        yield f" {equation} ", False
        yield f"{result}.", True


def lists(rng: random.Random) -> Iterator[Part]:
    """Numbers that are said again, in the same and in another order."""
    for _ in range(3):
        numbers = [
            rng.choice(NUMBERS) if rng.random() < 0.8 else rng.randint(1, LARGEST) for _ in range(rng.randint(2, 5))
        ]
        same, other = (", ".join(map(str, some)) for some in (numbers, rng.sample(numbers, len(numbers))))
        yield f"[{same}] ", False
        yield f"{same}. {other}.\n", True


def walk(rng: random.Random) -> Iterator[Part]:
    """A walk through the game without a target: what is left, a step on two of it, until one number is left."""
    pool = rng.sample(NUMBERS, rng.choice((3, 4)))
    yield f"Left: {', '.join(map(str, pool))}.", False
    while len(pool) > 1 and (step := random_step(pool, SCALE * NUMBERS[-1], set(), rng)):
        pool = after(pool, step)
        yield f" {written(step)}." + (f" Left: {', '.join(map(str, pool))}." if len(pool) > 1 else ""), True


def solved(pairs: list[tuple[str, str]], rng: random.Random) -> Iterator[Part]:
    """A problem's prompt and its solution."""
    prompt, response = rng.choice(pairs)
    yield prompt, False
    yield response, True


def words(texts: Iterable[str]) -> list[str]:
    """The words and marks of texts, each with the blank before it; twice, as once makes no token."""
    return 2 * sorted({word for text in texts for word in re.findall(r" ?[^\W\d]+| ?[^\w\s]+|\n", text)})


def row(
    kinds: list[Callable[[], Iterator[Part]]],
    shares: list[float],
    length: int,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
) -> tuple[list[int], list[float]]:
    """Token ids of texts one after another, and each one's weight in the loss; `length` + 1 of both."""
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) <= length:
        for text, learned in rng.choices(kinds, shares)[0]():
            some = tokenizer(text)["input_ids"]
            ids += some
            weights += [float(learned)] * len(some)
        ids.append(tokenizer.eos_token_id)
        weights.append(weights[-1])
    return ids[: length + 1], weights[: length + 1]


def train(model: Qwen2ForCausalLM, rows: Callable[[], tuple[Tensor, Tensor]], steps: int, lr: float) -> None:
    """Muon for the matrices, AdamW for the embeddings and norms; products in bf16.

    Args:
        rows: token ids and weights of a step, both of shape (rows, length + 1).
        lr: of both optimizers, since Muon's steps are made as large as AdamW's (arXiv 2502.16982).
    """
    import torch

    named = list(model.named_parameters())
    matrices = [each for name, each in named if each.ndim == 2 and "embed" not in name]
    others = [each for name, each in named if each.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: min(1, (step + 1) / 100, (1 - step / steps) / 0.7))
        for each in (muon, adamw)
    ]
    for _ in track(range(steps), "training"):
        ids, weights = rows()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        chosen = weights[:, 1:] > 0
        each = torch.nn.functional.cross_entropy(logits[chosen].float(), ids[:, 1:][chosen], reduction="none")
        weight = weights[:, 1:][chosen]
        ((each * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip((muon, adamw), schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def make(cfg: DictConfig, folder: Path) -> None:
    """Train the model and save it."""
    import pyarrow.parquet as pq
    import torch
    from transformers import set_seed

    set_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    messages = pq.read_table(f"{cfg.traces}/train.parquet", columns=["messages"])["messages"].to_pylist()
    pairs = [(each[0]["content"], each[-1]["content"]) for each in messages]
    tokenizer = make_tokenizer(words(chain(*pairs, *PHRASES["en"].values())), LARGEST, "{{ messages[-1]['content'] }}")
    model = make_model(tokenizer, LARGEST, SHAPE["hidden_size"] // 2, **SHAPE)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(pairs):,} solved problems")
    numbers = torch.zeros(len(tokenizer), dtype=torch.bool)
    numbers[tokenizer.convert_tokens_to_ids([str(number) for number in range(LARGEST + 1)])] = True
    kinds: dict[str, Callable[[], Iterator[Part]]] = {
        **{name: partial(kind, rng) for name, kind in (("equations", equations), ("lists", lists), ("walks", walk))},
        "solved": partial(solved, pairs, rng),
    }
    chosen, shares = [kinds[name] for name in cfg.texts], list(cfg.texts.values())

    def rows() -> tuple[Tensor, Tensor]:
        made = [row(chosen, shares, cfg.length, tokenizer, rng) for _ in range(cfg.rows)]
        ids = torch.tensor([each for each, _ in made])
        return ids, torch.tensor([each for _, each in made]) * torch.where(numbers[ids], NUMBER_WEIGHT, 1.0)

    train(model, rows, cfg.steps, cfg.lr)
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
