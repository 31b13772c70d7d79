"""python -m data_prep.render prompt=NAME tokenizer=PATH [numbers=[44,19,35]] [target=98]: what the model will see.

    python -m data_prep.render tokenizer=assets/tiny_base
    python -m data_prep.render prompt=mini_r1 tokenizer=Qwen/Qwen2.5-3B-Instruct numbers=[3,4,5] target=17

Prints the text of a prompt and its tokens with their boundaries. Like verl's agent loop (0.9.1, ContinuousTokenBuilder)
it calls `tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **options)`, with
`actor_rollout_ref.model.custom_chat_template` as the tokenizer's chat template and `data.apply_chat_template_kwargs` as
options. A test compares both. The last line says where a response begins, which decides what the reward asks of it.
"""

import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from omegaconf import DictConfig, OmegaConf

from data_prep.cli import UserError, command
from data_prep.hub import MIRROR, hub_fault, in_one_clause, reports_cache
from data_prep.prompts import fill_all, messages_for
from data_prep.schema import RenderKeys
from data_prep.solver import Array

TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # of the prompts, and of the reward's grammar


def load_tokenizer(path: str, prompt: dict[str, Any], trusted: bool = False) -> Any:
    """The tokenizer of a folder or of a model on the hub, with the prompt's chat template if it has one.

    Args:
        trusted: whether code that comes with the model may run.

    Raises:
        UserError: it cannot be loaded, or there is no chat template.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        fault = None if Path(path).exists() else hub_fault(path, "model")
        with reports_cache(fault, f"tokenizer={path}"):
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trusted, local_files_only=fault is not None
            )
    except Exception as error:  # transformers and tokenizers raise whatever their parsers do
        advice = "" if Path(path).exists() else f"; give a model's folder or its name on the hub, {MIRROR}"
        raise UserError(f"the tokenizer of {path} cannot be loaded ({in_one_clause(error)}){advice}") from None
    if prompt.get("chat_template") is not None:
        tokenizer.chat_template = prompt["chat_template"]
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {path} has no chat template, and prompt={prompt['name']} brings none; take a prompt "
            "that does, such as prompt=tinyzero_base"
        )
    return tokenizer


def special_tags(tokenizer: Any) -> list[str]:
    """The tags that are lost when verl 0.9.1 decodes a response without special tokens.

    Without them the reward finds no thought or no answer in any response, so every score is 0.
    """
    ids = {tag: tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in TAGS}
    return [tag for tag in TAGS if tag not in tokenizer.decode(ids[tag], skip_special_tokens=True)]


def special_tags_advice(tags: list[str], path: str) -> str:
    """What `special_tags` of a tokenizer mean, and what to do."""
    return (
        f"{', '.join(tags)} are special tokens of {path}, which verl removes from responses before it scores them, so "
        f'every reward would be 0; copy the folder, set "special": false for them in tokenizer.json and in '
        "tokenizer_config.json (added_tokens_decoder), and take them out of additional_special_tokens or "
        "extra_special_tokens"
    )


def response_begins(text: str) -> str:
    """Where a response to a prompt begins, by the prompt's text as the chat template made it.

    >>> [response_begins(text) for text in ("think.\\n<think>", "<think>\\n\\n</think>\\n\\n", "user: 1+2")]
    ['inside a thought', 'after an empty thought', 'before any thought']
    """
    if text.rstrip().endswith("<think>"):
        return "inside a thought"
    return "after an empty thought" if re.search(r"<think>\s*</think>\s*\Z", text) else "before any thought"


def render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> tuple[str, list[int]]:
    """Text and token ids of a prompt.

    Args:
        options: the prompt's `template_options`.

    Raises:
        UserError: the chat template does not take these messages.
    """
    from jinja2 import TemplateError

    try:
        apply = partial(tokenizer.apply_chat_template, messages, add_generation_prompt=True, **options)
        text, ids = apply(tokenize=False), apply(tokenize=True, return_dict=False)
    except TemplateError as error:
        raise UserError(f"the chat template does not take the prompt's messages ({in_one_clause(error)})") from None
    return text, ids


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; bytes that are not a whole character are shown as <0xE4>."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    decoder = {symbol: byte for byte, symbol in bytes_to_unicode().items()}  # what byte-level BPE writes for bytes
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    result = []
    for token_id, symbols in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if token_id in added or not all(symbol in decoder for symbol in symbols):
            result.append(added.get(token_id, symbols))
            continue
        raw = bytes(decoder[symbol] for symbol in symbols)
        try:
            result.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            result.append("".join(f"<0x{byte:02X}>" for byte in raw))
    return result


def token_counter(prompt: dict[str, Any], path: str) -> Callable[[pa.StringArray, pa.StringArray], Array]:
    """A function that maps the texts of numbers ("[44, 19, 35]") and targets to the prompts' lengths in tokens.

    The chat template is applied only once, to the prompt with its placeholders, and not to every row.
    """
    tokenizer, options = load_tokenizer(path, prompt), prompt.get("template_options", {})
    frame, _ = render(tokenizer, prompt["messages"], **options)

    def lengths(numbers: pa.StringArray, target: pa.StringArray) -> Array:
        texts = fill_all(frame, numbers, target).to_pylist()
        return np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])

    # This fails for a template that changes the contents, for example trims them. One real prompt is compared.
    problem = [44, 19, 35], 98
    if lengths(pa.array([str(problem[0])]), pa.array(["98"]))[0] != len(
        render(tokenizer, messages_for(prompt, *problem), **options)[1]
    ):
        raise UserError(
            f"prompt={prompt['name']}: its chat template changes the messages' contents; leave tokenizer=null"
        )
    return lengths


@command("render", RenderKeys)
def main(cfg: DictConfig) -> None:
    prompt: dict[str, Any] = OmegaConf.to_container(cfg.prompt, resolve=True)  # type: ignore[assignment]
    tokenizer = load_tokenizer(cfg.tokenizer, prompt)
    options = prompt.get("template_options", {})
    text, ids = render(tokenizer, messages_for(prompt, list(cfg.numbers), cfg.target), **options)
    if tags := special_tags(tokenizer):
        print(f"warning: {special_tags_advice(tags, cfg.tokenizer)}", file=sys.stderr)
    print(text)
    print(f"\n{len(ids)} tokens, each between bars:")
    print("|" + "|".join(piece.replace("\n", "\\n") for piece in pieces(tokenizer, ids)) + "|")
    print(f"\na response begins {response_begins(text)}")


if __name__ == "__main__":
    main()
