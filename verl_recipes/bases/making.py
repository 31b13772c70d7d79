"""An untrained small Qwen2 whose numbers are one token each, and the folder of the trained one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.folder import replaced
from data_prep.render import TAGS

if TYPE_CHECKING:  # these imports take seconds, and only training needs them
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

EOS, PAD = "<|im_end|>", "<|endoftext|>"


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


def make_model(tokenizer: PreTrainedTokenizerFast, largest: int, features: int, **shape: int) -> Qwen2ForCausalLM:
    """The untrained model, with number features for the embeddings of the numbers 0..largest.

    Args:
        features: how many components of an embedding are features; the others stay random.
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
        # Sine and cosine of each number at features / 2 geometric periods, from 2 to 2 * (largest + 1).
        periods = 2 * (largest + 1) ** torch.linspace(0, 1, features // 2)
        angles = 2 * math.pi * torch.arange(largest + 1)[:, None] / periods
        values = torch.cat([angles.sin(), angles.cos()], dim=1) * config.initializer_range * math.sqrt(2)
        model.get_input_embeddings().weight[ids, :features] = values
    return model


def make_new(out: str, make: Callable[[Path], None]) -> None:
    """Let `make` fill a new folder, which appears as a whole.

    Raises:
        UserError: it exists, or cannot be written; then nothing is made.
    """
    with replaced(Path(out), new_only=True) as folder:
        make(folder)
    print(f"wrote {out}")


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, longest: int) -> None:
    """Model and tokenizer, with responses of at most `longest` tokens as their default."""
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=longest
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
