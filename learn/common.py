"""What the scripts of learn/ share and none of them teaches: options, data, sampling, micro-batches, curves.

The lesson itself is repeated in every script on purpose, so that each can be read from top to bottom.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402

from data_prep.cli import UserError  # noqa: E402
from reward_score import countdown, random_control  # noqa: E402
from verl_recipes.settings.configuration import MICRO_BATCH  # noqa: E402

BASE = ROOT / "assets" / "tiny_base"
DATA = ROOT / "data" / "tiny"
RUNS = ROOT / "runs" / "learn"  # curves of this machine
RECORDED = ROOT / "learn" / "curves"  # curves in the repository, shown for a script that did not run here
LONGEST = json.loads((BASE / "generation_config.json").read_text(encoding="utf-8"))["max_new_tokens"]
OPTIMIZERS = ("SGD", "Adam", "AdamW")  # of torch.optim
WINDOW = 3  # steps that are averaged in pictures and tables, 768 responses


class Sample(NamedTuple):
    """A response to a prompt, as tokens; the log-probability that it was drawn with, a number a token; its verdict."""

    prompt: list[int]
    response: list[int]
    log_probabilities: list[float]
    score: float
    acc: float


def options(script: str, **defaults: Any) -> SimpleNamespace:
    """The defaults, changed by `key=value` on the command line; `name` tells this run from the script's others."""
    values = dict(defaults)
    for argument in [] if "ipykernel" in sys.modules else sys.argv[1:]:  # a notebook edits the defaults instead
        key, _, text = argument.partition("=")
        if key not in defaults:
            raise UserError(f"{argument}: there is no such key; {script} has {', '.join(defaults)}")
        try:
            values[key] = type(defaults[key])(text)
        except ValueError:
            raise UserError(f"{argument}: should be a value such as {key}={defaults[key]}") from None
        # A group has two responses or more, and an error over problems needs two of them.
        least = {"n": 2, "prompts": 2, "held_out": 2, "seed": 0, "divide": 0, "start": 0}.get(key, 1)
        if isinstance(values[key], int) and values[key] < least:
            raise UserError(f"{argument}: should be {least} or more")
        if isinstance(values[key], float) and not 0 <= values[key] < math.inf:
            raise UserError(f"{argument}: should be a number, 0 or more")
    if values.get("reward", "countdown") not in REWARDS:
        raise UserError(f"reward={values['reward']}: there is no such reward; there are {', '.join(REWARDS)}")
    if values.get("optimizer", "SGD") not in OPTIMIZERS:
        raise UserError(f"optimizer={values['optimizer']}: should be one of {', '.join(OPTIMIZERS)}")
    responses = values.get("prompts", 1) * values.get("n", 1)
    if "updates" in values and responses % values["updates"]:
        raise UserError(
            f"updates={values['updates']} does not divide the {responses} responses of a step (prompts x n)"
        )
    changed = [f"{key}={value}" for key, value in values.items() if value != defaults[key]]
    return SimpleNamespace(**values, name="-".join([script, *changed]))


def load(seed: int) -> tuple[Any, Any, list[dict[str, Any]], list[dict[str, Any]]]:
    """The base model, its tokenizer, the training problems in the seed's order, and the held-out problems."""
    torch.manual_seed(seed)
    sets = []
    for name in ("train", "test"):
        path = DATA / f"{name}.parquet"
        if not path.exists():
            raise UserError(f"{path} is missing; make it with `python -m data_prep`")
        sets.append(load_dataset("parquet", data_files=str(path), split="train"))
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(BASE), sets[0].shuffle(seed).to_list(), sets[1].to_list()


def batch_of(problems: Sequence[dict[str, Any]], step: int, size: int) -> list[dict[str, Any]]:
    """The problems of a step, from 0; after the last problem comes the first."""
    return [problems[index % len(problems)] for index in range(step * size, (step + 1) * size)]


# What a response is paid for, by its verdict and its tokens. The last two can be had without a right answer.
REWARDS = {
    "countdown": lambda verdict, tokens: verdict["score"],  # 1 if right, 0.1 if well formed, else 0
    "random": lambda verdict, tokens: verdict["score"],  # a coin: reward_score/random_control.py
    "length": lambda verdict, tokens: len(tokens) / LONGEST,  # "a longer thought is a better one"
    "format": lambda verdict, tokens: verdict["format"],  # an equation, right or wrong
}


def sample(
    model: Any, tokenizer: Any, problems: list[dict[str, Any]], n: int, reward: str = "countdown"
) -> list[Sample]:
    """n scored responses to each problem at temperature 1; those to one problem stand together."""
    prompts = [tokenizer("".join(part["content"] for part in problem["prompt"])).input_ids for problem in problems]
    drawn = generate(model, prompts, n)
    texts = tokenizer.batch_decode([response for response, _ in drawn], skip_special_tokens=True)
    score = (random_control if reward == "random" else countdown).compute_score
    samples = []
    for index, ((response, log_probabilities), text) in enumerate(zip(drawn, texts, strict=True)):
        problem = problems[index // n]
        verdict = score(
            problem["data_source"], text, problem["reward_model"]["ground_truth"], problem.get("extra_info")
        )
        paid = REWARDS[reward](verdict, response)
        samples.append(Sample(prompts[index // n], response, log_probabilities, paid, verdict["acc"]))
    return samples


@torch.inference_mode()
def generate(model: Any, prompts: list[list[int]], n: int) -> list[tuple[list[int], list[float]]]:
    """n responses to each prompt, in the order of the prompts, with the log-probability of each of their tokens.

    Prompts are read once and their cache is repeated for the group. Finished responses leave the batch.
    """
    end, pad, width = model.config.eos_token_id, model.config.pad_token_id, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits
    cache.batch_repeat_interleave(n)
    logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    position = mask.sum(1, keepdim=True)
    alive = torch.arange(len(prompts) * n)
    drawn: list[tuple[list[int], list[float]]] = [([], []) for _ in alive]
    for _ in range(LONGEST):
        log_p = logits[:, -1].log_softmax(-1)
        token = torch.multinomial(log_p.exp(), 1)
        for index, value, chosen in zip(
            alive.tolist(), token[:, 0].tolist(), log_p.gather(1, token)[:, 0].tolist(), strict=True
        ):
            if drawn[index][0][-1:] != [end]:
                drawn[index][0].append(value)
                drawn[index][1].append(chosen)
        going = (token[:, 0] != end).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < 0.8 * len(alive) or len(going) < 16:
            cache.batch_select_indices(going)
            alive, token, mask, position = alive[going], token[going], mask[going], position[going]
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        logits = model(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits
        position = position + 1
    return drawn


def micro_batches(samples: Sequence[Sample], *columns: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    """Ids (rows, width), a mask (rows, width - 1) of the response's tokens among ids[:, 1:], and the columns.

    A column holds a number for each sample, which becomes (rows, 1), or a list with a number for each token of the
    response, which becomes (rows, width - 1). Samples of similar length come together, so little of a batch is padding.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt) + len(samples[i].response))
    for start in range(0, len(order), MICRO_BATCH):
        rows = order[start : start + MICRO_BATCH]
        width = max(len(samples[i].prompt) + len(samples[i].response) for i in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        tensors = [torch.zeros(len(rows), width - 1) for _ in range(1 + len(columns))]
        for row, i in enumerate(rows):
            whole = samples[i].prompt + samples[i].response
            ids[row, : len(whole)] = torch.tensor(whole)
            for tensor, value in zip(tensors, [1.0, *(column[i] for column in columns)], strict=True):
                tensor[row, len(samples[i].prompt) - 1 : len(whole) - 1] = torch.tensor(value)
        yield [ids, *tensors]


def standard_error(samples: Sequence[Sample]) -> float:
    """Of the mean of `acc`. The responses to one problem are alike, so a problem's mean is one observation."""
    verdicts: dict[tuple[int, ...], list[float]] = {}
    for each in samples:
        verdicts.setdefault(tuple(each.prompt), []).append(each.acc)
    return statistics.stdev(map(statistics.fmean, verdicts.values())) / math.sqrt(len(verdicts))


def curve_file(name: str) -> Path:
    """Where the curve of a run is: from this machine if it ran here, else the one in the repository."""
    here = RUNS / f"{name}.jsonl"
    return here if here.exists() else RECORDED / f"{name}.jsonl"


def read_curve(name: str) -> list[dict[str, float]]:
    """The lines of a run, one a step, and last the one with `held_out`; none if it never ran."""
    path = curve_file(name)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class Run:
    """Prints a line of JSON a step, keeps it in runs/learn/NAME.jsonl, and draws NAME.png at the end."""

    def __init__(self, name: str) -> None:
        self.name, self.path, self.seconds = name, RUNS / f"{name}.jsonl", [0.0]
        RUNS.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")
        self.began = time.perf_counter()

    def line(self, **figures: float) -> None:
        """Print and keep a line."""
        text = json.dumps(figures)
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def step(self, step: int, samples: list[Sample], **others: float) -> None:
        """The line of a step, from 0."""
        now = time.perf_counter()
        self.line(
            step=step + 1,
            score=round(statistics.fmean(each.score for each in samples), 3),
            acc=round(statistics.fmean(each.acc for each in samples), 3),
            acc_error=round(standard_error(samples), 3),
            tokens=round(statistics.fmean(len(each.response) for each in samples), 1),
            **{name: round(value, 4) for name, value in others.items()},
            step_s=round(now - self.began, 2),
        )
        self.began = now

    def finish(self, model: Any, tokenizer: Any, problems: list[dict[str, Any]], n: int = 8) -> None:
        """Measure the model on held-out problems, mean@8; draw the curve beside those of the earlier scripts."""
        samples = sample(model, tokenizer, problems, n)
        self.line(
            held_out=round(statistics.fmean(each.acc for each in samples), 4),
            held_out_error=round(standard_error(samples), 4),
            held_out_tokens=round(statistics.fmean(len(each.response) for each in samples), 1),
        )
        self.draw()

    def draw(self) -> None:
        """The curve beside those of the earlier scripts, with their defaults."""
        script = self.name.split("-")[0]
        earlier = sorted({path.stem for folder in (RECORDED, RUNS) for path in folder.glob("[1-6]_*.jsonl")})
        names = [name for name in earlier if "-" not in name and name <= script] + [self.name]
        print(f"curve: {draw(list(dict.fromkeys(names)), RUNS / f'{self.name}.png')}")


def smooth(values: list[float]) -> list[float]:
    """Each value's mean with the ones before it, WINDOW in all."""
    return [statistics.fmean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]


def draw(names: list[str], path: Path) -> Path:
    """The accuracy and the length of runs over the steps; the last run is drawn on top."""
    from matplotlib.figure import Figure  # unlike pyplot it needs no screen

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, key, title in zip(figure.subplots(1, 2), ("acc", "tokens"), ("right", "response tokens"), strict=True):
        for name in names:
            values = [line[key] for line in read_curve(name) if "step" in line]
            axis.plot(range(1, len(values) + 1), smooth(values), label=name, lw=2.2 if name == names[-1] else 1.1)
        axis.set(title=f"{title}, mean of {WINDOW} steps", xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    return path


def row(name: str) -> str:
    """A run as a row of the pages' tables: right and tokens, first and last; and the held-out mean@8."""
    lines = read_curve(name)
    steps, last = [line for line in lines if "step" in line], lines[-1]
    means = [
        [statistics.fmean(line[key] for line in part) for part in (steps[:WINDOW], steps[-WINDOW:])]
        for key in ("acc", "tokens")
    ]
    (first, end), (short, long) = means
    held_out = f"{last['held_out']:.3f}" if "held_out" in last else "-"
    return f"| `{name}` | {first:.2f} → {end:.2f} | {short:.0f} → {long:.0f} | {held_out} |"
