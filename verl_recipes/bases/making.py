"""A small Qwen2 whose numbers are one token each, and its training by transformers' Trainer."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.cli import UserError
from data_prep.folder import replaced

if TYPE_CHECKING:  # these imports take seconds, and only training needs them
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

EOS, PAD = "<|im_end|>", "<|endoftext|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
Row = dict[str, list[int]]


def make_tokenizer(
    words: Sequence[str], largest: int, chat_template: str, phrases: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, with the tags, the numbers 10 to `largest` and `phrases` as tokens of their own.

    These are *added* tokens, because transformers 5 gives every tokenizer beside a qwen2 model Qwen2's own
    pre-tokenizer, which would split them. They are not *special*, because verl strips special tokens before it scores a
    response.

    Args:
        words: texts without numbers; each of their words becomes a token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    added = [*phrases, *TAGS, *map(str, range(10, largest + 1))]
    wrapped.add_tokens([AddedToken(text, normalized=False) for text in added])
    wrapped.chat_template = chat_template
    return wrapped


def number_features(dim: int, largest: int) -> Tensor:
    """Sine and cosine of 0..largest at `dim` / 2 geometric periods from 2 to 2 * (largest + 1).

    Shape (largest + 1, dim).
    """
    import torch

    periods = 2 * (largest + 1) ** torch.linspace(0, 1, dim // 2)
    angles = 2 * math.pi * torch.arange(largest + 1)[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def make_model(tokenizer: PreTrainedTokenizerFast, largest: int, features: int, **shape: int) -> Qwen2ForCausalLM:
    """The untrained model, with number features for the embeddings of the numbers 0..largest.

    Args:
        features: how many of an embedding's numbers are features; the others stay random.
        shape: hidden_size and the other sizes of transformers' Qwen2Config.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),  # no surplus ids: verl masks them in the rollout engine but not in the actor
        tie_word_embeddings=True,
        initializer_range=0.03,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
        **shape,
    )
    model = Qwen2ForCausalLM(config)
    ids = [tokenizer.convert_tokens_to_ids(str(number)) for number in range(largest + 1)]
    with torch.no_grad():
        values = number_features(features, largest) * config.initializer_range * math.sqrt(2)
        model.get_input_embeddings().weight[ids, :features] = values
    return model


def in_batches(sample: Callable[[], Row], batch: int, rng: random.Random) -> Iterator[Row]:
    """An endless stream of samples, of which each `batch` in a row are of similar length and so hold little padding."""
    while True:
        pool = sorted((sample() for _ in range(32 * batch)), key=lambda row: len(row["labels"]))
        batches = [pool[i : i + batch] for i in range(0, len(pool), batch)]
        rng.shuffle(batches)
        yield from (row for some in batches for row in some)


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Iterator[Row],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    bf16: bool = False,
) -> None:
    """Supervised training: constant learning rate, then linear decay to 0 over the last 70% of the steps.

    With `bf16` the matrices are multiplied in bf16, which processors that can do it do twice as fast.
    """
    from torch.utils.data import IterableDataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Row]:
            return rows

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=lr,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": int(0.7 * steps), "decay_type": "linear"},
            warmup_steps=20,
            adam_beta2=0.98,
            weight_decay=0.01,
            max_grad_norm=1.0,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=bf16,
            seed=seed,
        )
        Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), Stream()).train()


def make_new(out: str, make: Callable[[Path], None]) -> None:
    """Let `make` fill a new folder, which appears as a whole.

    Raises:
        UserError: it exists, or cannot be written; then nothing is made.
    """
    if Path(out).exists():
        raise UserError(f"out={out} exists; name a new folder, or move that one away")
    with replaced(Path(out)) as folder:
        make(folder)
    print(f"wrote {out}")


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, longest: int) -> None:
    """Model and tokenizer, with responses of at most `longest` tokens as their default."""
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=longest
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
