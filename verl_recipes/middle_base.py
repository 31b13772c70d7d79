"""python -m verl_recipes.middle_base [traces=FOLDER] [out=models/middle]: makes the base model of the middle rung.

A Qwen2 of five million parameters that comes to the game as a pretrained model would. It reads the prompt in full, word
by word, can calculate, and has read searches, but never after the prompt, where it has seen only problems that were
solved at once. Most of its responses to a prompt search all the same (docs/warm_start.md).

    bash launch/middle.sh                                                       the problems, the traces, and the rest
    python -m verl_recipes.middle_base                                          an hour on two cores
    python -m verl_recipes.middle_base steps=200 sums_first=50 out=models/try   a quick look

What makes it possible in an hour on two cores (docs/log.md has what did not):
- Numbers up to 999 are one token each, as Llama 3 has them. Half of each one's embedding starts as sine and cosine
  features of the number, which pretrained models were found to have (arXiv 2406.03445). The other half is random, so
  that a number is easy to copy.
- Every text is a sequence of its own. In rows that hold several, the numbers of all others distract from copying.
- Equations alone come first: calculating sets the ceiling of everything later.
- In a search, the numbers that remain are said after each step. A model of this size does not see them by itself.
- A number or a word of a verdict that follows from the text before weighs more in the loss than what is free to choose.
- Results are compared with a target that lies at any distance. At one distance, a model learns the distance.
- Muon (https://kellerjordan.github.io/posts/muon) trains the matrices: sums are learned in half of AdamW's steps.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, NamedTuple, Self

from omegaconf import DictConfig
from pydantic import Field, model_validator
from rich.progress import track

from data_prep.cli import CONFIGS, Checked, Count, PathText, Positive, Seed, Share, Size, UserError, command
from data_prep.schema import Proportions
from data_prep.search import Whole, steps_between
from data_prep.wording import PHRASES, SCALE, phrases, write_trace, written
from verl_recipes.bases.making import make_model, make_new, make_tokenizer, save
from verl_recipes.run.preflight import check_parquet

if TYPE_CHECKING:  # these imports take seconds, and only training needs them
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

LARGEST = 999  # the largest number with a token of its own
NUMBERS = range(1, 100)  # of the problems
FAR = 600  # the largest number of an equation that is not of a problem
KNOWN = 5  # weight in the loss of a number or verdict that follows from the text before; all else that is learned has 1
TRIES = 6  # the most wrong tries of a search
REPORTED = 500  # steps from one shown loss to the next
OPENING = "Assistant:"  # ends the question in a prompt
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
RESPONSE = 384  # tokens of the longest response, as in configs/recipe/middle.yaml
POOL = 2048  # texts that are sorted by length at once
MAKES = "python -m data_prep.traces data=data/middle out=data/middle-direct styles.first_try=1 styles.search=0"
MAKES += " styles.search_with_backtracking=0"  # the command that writes the traces
NOT, FREE, SURE = range(3)  # not learned; learned; learned, and it follows from the text before
Parts = list[tuple[str, int]]  # of a text: what they say, and one of NOT, FREE and SURE
LISTS = sorted({each.partition(" {}")[0] for key in ("left", "back") for each in PHRASES["en"][key]})
VERDICTS = sorted({each[len("{},") : -1] for key in ("small", "large", "hit") for each in PHRASES["en"][key]})
FOLLOWS = re.compile(  # of a response, in this order: what is needed, results, numbers, verdicts, check and answer
    r"(^ (?:I need|The target) .+?\.(?=\s)|(?<==) \d+|"
    + "".join(rf"(?<={re.escape(each)}) \d[\d, ]*|" for each in LISTS)
    + "".join(rf"(?<=,){re.escape(each)}(?=\.)|" for each in VERDICTS)
    + r"\nCheck[\s\S]+)"
)


class Problem(NamedTuple):
    """A problem of the training data, and the steps of its solution."""

    prompt: str
    response: str
    numbers: list[int]
    target: int
    steps: list[Whole]


class Shares(Proportions):
    equations: Share = Field(description="equations alone")
    lists: Share = Field(description="numbers that are said again")
    comparisons: Share = Field(description="results that are compared with a target")
    searched: Share = Field(description="searches, alone or after a question")
    solved: Share = Field(description="prompts with a solution at once")


class Keys(Checked):
    out: PathText = Field(description="the model's folder, a new one")
    traces: PathText = Field(description="a folder of data_prep.traces: problems that are solved at once, in English")
    seed: Seed = Field(description="of the texts and the training")
    steps: Count = Field(description="of the training")
    sums_first: Size = Field(description="how many of them, the first, read equations alone")
    tokens: Annotated[Count, Field(ge=1024)] = Field(description="the most tokens a step, with the padding")
    lr: Positive = Field(description="learning rate, with linear decay over the last 70% of the steps")
    texts: Shares = Field(description="of each kind of text, its share of the tokens; only the proportions count")

    @model_validator(mode="after")
    def _prompts_are_read(self) -> Self:
        if self.sums_first >= self.steps:
            raise ValueError(f"sums_first={self.sums_first} leaves none of steps={self.steps} for other texts")
        return self


def some_number(rng: random.Random, most: int) -> int:
    """Mostly one of a problem."""
    return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.randint(1, most)


def equations(rng: random.Random) -> Parts:
    """Twelve equations, of which the results are learned."""
    text: Parts = []
    while len(text) < 24:
        a, b = rng.sample([some_number(rng, FAR), rng.choice(NUMBERS)], 2)
        if some := steps_between(a, b, SCALE * NUMBERS[-1]):
            left, result = written(rng.choice(some)).rsplit(" ", 1)
            text += [(f" {left}", NOT), (f" {result}.", SURE)]
    return text


def lists(rng: random.Random) -> Parts:
    """Numbers that are said again, in the same and in another order."""
    text: Parts = []
    for _ in range(2):
        numbers = [some_number(rng, LARGEST) for _ in range(rng.randint(2, 5))]
        same, other = (", ".join(map(str, some)) for some in (numbers, rng.sample(numbers, len(numbers))))
        text += [(f"[{same}]", NOT), (f" {same}.", SURE), (f" {other}.\n", FREE)]
    return text


def comparisons(rng: random.Random) -> Parts:
    """Eight equations whose results are compared with one target, which lies ever farther back; some hit it."""
    target, say = rng.choice(NUMBERS), phrases("en", rng)
    numbers = ", ".join(map(str, rng.sample(NUMBERS, rng.choice((3, 4)))))
    text: Parts = [(f" {say('need', target=target, numbers=numbers)}", NOT)]
    while len(text) < 40:  # five parts each
        a, b = rng.sample(NUMBERS, 2)
        if rng.random() < 0.3:  # a sum or a difference that hits
            a, b = (b, target - b) if b < target else (target + b, b)
        if some := steps_between(a, b, SCALE * NUMBERS[-1]):
            step = next((each for each in some if each[3] == target), rng.choice(some))
            verdict = "hit" if step[3] == target else "small" if step[3] < target else "large"
            text += in_parts(f" {say(verdict, written(step))}")
    return text


def in_parts(response: str) -> Parts:
    """A response, of which results, numbers that are said again, verdicts, the check and the answer are sure."""
    return [(part, SURE if i % 2 else FREE) for i, part in enumerate(FOLLOWS.split(response)) if part]


def solved(problems: Sequence[Problem], rng: random.Random) -> Parts:
    """A problem's prompt, and its solution at once."""
    prompt, response, *_ = rng.choice(problems)
    return [(prompt, NOT), *in_parts(response)]


def searched(problems: Sequence[Problem], rng: random.Random) -> Parts:
    """A search, alone or after a problem's question, but never after its whole prompt."""
    prompt, _, numbers, target, steps = rng.choice(problems)
    style = "search_with_backtracking"
    text, _ = write_trace(numbers, target, steps, style=style, tries=rng.randint(0, TRIES), language="en", rng=rng)
    question, opening, _ = prompt.rpartition(OPENING)
    return [*([(question + opening, NOT)] if rng.random() < 0.5 else []), *in_parts(text)]


def read(file: str) -> list[Problem]:
    """The problems of a file of traces that are solved in steps of integers."""
    import pyarrow.parquet as pq

    problems = []
    for row in pq.read_table(file, columns=["messages", "reward_model"]).to_pylist():
        prompt, response = row["messages"][0]["content"], row["messages"][-1]["content"]
        found = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", response.partition("\nCheck")[0])
        steps = [(int(a), operator, int(b), int(value)) for a, operator, b, value in found]
        numbers, target = row["reward_model"]["ground_truth"]["numbers"], row["reward_model"]["ground_truth"]["target"]
        if len(steps) == len(numbers) - 1:
            problems.append(Problem(prompt, response, numbers, target, steps))
    return problems


def words(texts: Iterable[str]) -> list[str]:
    """The words and marks of texts, each with the blank before it."""
    return sorted({word for text in texts for word in re.findall(r" ?[^\W\d]+| ?[^\w\s]+|\n", text)})


def encoded(text: Parts, tokenizer: PreTrainedTokenizerFast, known: set[int]) -> tuple[list[int], list[float]]:
    """Token ids of a text with its end, and each one's weight in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    for part, kind in text:
        some = tokenizer(part)["input_ids"]
        ids += some
        weights += [KNOWN if kind == SURE and each in known else float(kind != NOT) for each in some]
    return [*ids, tokenizer.eos_token_id], [*weights, 1.0]


def batches(
    kinds: Sequence[Callable[[], Parts]],
    shares: Sequence[float],
    tokens: int,
    tokenizer: PreTrainedTokenizerFast,
    known: set[int],
    rng: random.Random,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and weights, both of shape (texts, longest), of texts of similar length.

    Args:
        shares: of the tokens, by kind.
        tokens: at most so many a batch.
        known: token ids of numbers and verdicts, which weigh more where they are sure.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def text(kind: Callable[[], Parts]) -> tuple[list[int], list[float]]:
        return encoded(kind(), tokenizer, known)

    draws = [share / fmean(len(text(kind)[0]) for _ in range(50)) for kind, share in zip(kinds, shares, strict=True)]
    while True:
        pool = sorted((text(rng.choices(kinds, draws)[0]) for _ in range(POOL)), key=lambda each: len(each[0]))
        made: list[list[tuple[list[int], list[float]]]] = [[]]
        for each in pool:
            if (len(made[-1]) + 1) * len(each[0]) > tokens:
                made.append([])
            made[-1].append(each)
        rng.shuffle(made)
        for batch in made:
            ids = pad_sequence([torch.tensor(ids) for ids, _ in batch], True, tokenizer.pad_token_id)
            yield ids, pad_sequence([torch.tensor(weights) for _, weights in batch], True, 0.0)


def train(model: Qwen2ForCausalLM, texts: Iterator[tuple[Tensor, Tensor]], steps: int, lr: float) -> None:
    """Muon for the matrices, AdamW for embeddings, norms and biases; products in bf16.

    Args:
        texts: token ids and weights of a step, both of shape (texts, longest).
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
    for step in track(range(steps), "training"):
        ids, weights = next(texts)
        learned = weights[:, 1:] > 0
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.lm_head(model.model(ids[:, :-1]).last_hidden_state[learned])
        losses = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][learned], reduction="none")
        weight = weights[:, 1:][learned]
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip((muon, adamw), schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if (step + 1) % REPORTED == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")


def make(cfg: DictConfig, folder: Path) -> None:
    """Train the model and save it."""
    from transformers import set_seed

    set_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    problems = read(f"{cfg.traces}/train.parquet")
    if not problems or OPENING not in problems[0].prompt:
        raise UserError(
            f"traces={cfg.traces} has no English solutions after a prompt with {OPENING!r}; make them with `{MAKES}`"
        )
    texts = chain.from_iterable((each.prompt, each.response) for each in problems)
    tokenizer = make_tokenizer(words(chain(texts, *PHRASES["en"].values())), LARGEST, "{{ messages[-1]['content'] }}")
    model = make_model(tokenizer, LARGEST, SHAPE["hidden_size"] // 2, **SHAPE)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(problems):,} solved problems")
    numbers = [str(number) for number in range(LARGEST + 1)]
    known = {*tokenizer("".join(VERDICTS))["input_ids"], *tokenizer.convert_tokens_to_ids(numbers)}
    kinds = {each.__name__: partial(each, rng=rng) for each in (equations, lists, comparisons)}
    kinds |= {each.__name__: partial(each, problems, rng) for each in (searched, solved)}
    drawn = partial(batches, tokens=cfg.tokens, tokenizer=tokenizer, known=known, rng=rng)
    sums, mixed = drawn([kinds["equations"]], [1.0]), drawn([kinds[each] for each in cfg.texts], [*cfg.texts.values()])
    train(model, chain(islice(sums, cfg.sums_first), mixed), cfg.steps, cfg.lr)
    save(model, tokenizer, folder, RESPONSE)


@command("middle_base", Keys, CONFIGS / "commands")
def main(cfg: DictConfig) -> None:
    if not Path(cfg.traces).is_dir():
        raise UserError(
            f"traces={cfg.traces}: there is no such folder; `bash launch/middle.sh` makes data/middle-direct"
        )
    check_parquet(f"{cfg.traces}/train.parquet", "traces", MAKES, {"messages", "reward_model"})
    make_new(cfg.out, partial(make, cfg))


if __name__ == "__main__":
    main()
