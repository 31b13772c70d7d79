"""python -m data_prep.render prompt=NAME tokenizer=PATH [numbers=[44,19,35]] [target=98]: what the model will see.

Prints the text of a prompt and its tokens with their boundaries. verl's agent loop (0.9.1, ContinuousTokenBuilder) gets
its tokens from `tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)`, after
`actor_rollout_ref.model.custom_chat_template` became the tokenizer's chat template; so does this. A test compares both.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from data_prep.cli import Checked, UserError, command
from data_prep.prompts import check_prompt, fill_all, messages_for

Array = NDArray[Any]


def load_tokenizer(path: str, prompt: dict[str, Any]) -> Any:
    """The tokenizer of a folder or a hub's model, with the prompt's chat template where it has one."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer={path} cannot be loaded ({str(error).strip().splitlines()[0]})") from None
    if prompt.get("chat_template") is not None:
        tokenizer.chat_template = prompt["chat_template"]
    if tokenizer.chat_template is None:
        raise UserError(f"neither tokenizer={path} nor prompt={prompt['name']} has a chat template")
    return tokenizer


def render(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
    """Text and token ids of a prompt."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return text, ids


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; bytes that are no whole character of their own show as such, <0xE4>."""
    decoder = {symbol: byte for byte, symbol in _byte_symbols().items()}
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    result = []
    for token_id, symbols in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if token_id in added or not all(symbol in decoder for symbol in symbols):
            result.append(added.get(token_id, symbols))
            continue
        raw = bytes(decoder[symbol] for symbol in symbols)
        try:
            result.append(raw.decode())
        except UnicodeDecodeError:
            result.append("".join(f"<0x{byte:02X}>" for byte in raw))
    return result


def _byte_symbols() -> dict[int, str]:
    """The characters that byte-level BPE writes for bytes (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def token_counter(prompt: dict[str, Any], path: str) -> Callable[[pa.StringArray, pa.StringArray], Array]:
    """A function from the texts of numbers ("[44, 19, 35]") and targets to the prompts' lengths in tokens.

    The chat template is applied once, around the places of numbers and target, and not once a row.
    """
    tokenizer = load_tokenizer(path, prompt)
    frame, _ = render(tokenizer, prompt["messages"])

    def lengths(numbers: pa.StringArray, target: pa.StringArray) -> Array:
        texts = fill_all(frame, numbers, target).to_pylist()
        return np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])

    # A template that changes the contents (trims them, say) would make the frame another text than the real one.
    problem = [44, 19, 35], 98
    if lengths(pa.array([str(problem[0])]), pa.array(["98"]))[0] != len(
        render(tokenizer, messages_for(prompt, *problem))[1]
    ):
        raise UserError(
            f"prompt={prompt['name']}: its chat template changes the messages' contents; leave tokenizer=null"
        )
    return lengths


@command("render", Checked)
def main(cfg: DictConfig) -> None:
    prompt: dict[str, Any] = OmegaConf.to_container(cfg.prompt, resolve=True)  # type: ignore[assignment]
    check_prompt(prompt)
    tokenizer = load_tokenizer(cfg.tokenizer, prompt)
    text, ids = render(tokenizer, messages_for(prompt, list(cfg.numbers), cfg.target))
    print(text)
    print(f"\n{len(ids)} tokens, each between bars:")
    print("|" + "|".join(piece.replace("\n", "\\n") for piece in pieces(tokenizer, ids)) + "|")


if __name__ == "__main__":
    main()
