"""From problems to verl's rows: fills in prompts (configs/prompt) for a whole table at once.

One row (https://verl.readthedocs.io/en/latest/preparation/prepare_data.html):

    data_source   "countdown/3_numbers"
    prompt        [{"role": "user", "content": "A conversation between User and Assistant. ..."}]
    ability       "math"
    reward_model  {"style": "rule", "ground_truth": {"numbers": [11, 18, 25], "target": 175}}
    extra_info    {"split": "train", "index": 0, "difficulty": 1.83, "solutions": 1}

In the messages of a prompt, {numbers} stands for the numbers as a Python list and {target} for the target. All other
braces are text.
"""

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.solver import Array
from data_prep.split import as_lists, joined

PLACES = ("{numbers}", "{target}")
_PLACE = re.compile(r"\{(numbers|target)\}")


def fill(text: str, numbers: list[int], target: int) -> str:
    """One message's content for one problem.

    >>> fill("{numbers} to {target}, as {x}", [44, 19, 35], 98)
    '[44, 19, 35] to 98, as {x}'
    """
    return _PLACE.sub(lambda found: str({"numbers": numbers, "target": target}[found[1]]), text)


def messages_for(prompt: dict[str, Any], numbers: list[int], target: int) -> list[dict[str, str]]:
    return [{"role": m["role"], "content": fill(m["content"], numbers, target)} for m in prompt["messages"]]


def fill_all(text: str, numbers: pa.StringArray, target: pa.StringArray) -> pa.StringArray:
    """One message's content for every problem, from the texts of numbers ("[44, 19, 35]") and targets."""
    pieces: list[Any] = [
        {"numbers": numbers, "target": target}[piece] if i % 2 else pa.scalar(piece)
        for i, piece in enumerate(_PLACE.split(text))
    ]
    if len(pieces) == 1:
        return pa.repeat(pieces[0], len(numbers))
    return pc.binary_join_element_wise(*pieces, "")


def number_texts(lists: pa.ListArray) -> pa.StringArray:
    """Lists of numbers as Python prints them."""
    return pc.binary_join_element_wise("[", joined(lists, ", "), "]", "")


def to_table(
    prompt: dict[str, Any], rows: Array, solved: Array, split: str, first: int, data_source: str | None
) -> pa.Table:
    """Problems as rows in verl's schema (see the top).

    Args:
        rows, solved: ROW and SOLVED of data_prep/steps.py.
        split, first: for extra_info; `first` is the index of the first row.
        data_source: the name under which verl reports these rows; None for a name by how many numbers each has.
    """
    size, messages, count = len(rows), prompt["messages"], rows["count"].astype(np.int64)
    lists = as_lists(rows["numbers"], count)
    targets = pa.array(rows["target"].astype(np.int64))
    texts = number_texts(lists), targets.cast(pa.string())
    contents = [fill_all(message["content"], *texts) for message in messages]
    content = contents[0]
    if len(messages) > 1:  # message 0 of row 0, message 1 of row 0, ...
        order = np.arange(size * len(messages)).reshape(len(messages), size).T.ravel()
        content = pa.concat_arrays(contents).take(pa.array(order))
    role = pa.array([message["role"] for message in messages]).take(pa.array(np.tile(np.arange(len(messages)), size)))
    offsets = pa.array(np.arange(0, size * len(messages) + 1, len(messages)), pa.int32())
    truth = pa.StructArray.from_arrays([lists, targets], ["numbers", "target"])
    info = {
        "split": pa.repeat(split, size),
        "index": pa.array(np.arange(first, first + size)),
        "difficulty": pa.array(solved["difficulty"], mask=np.isnan(solved["difficulty"])),
        "solutions": pa.array(solved["solutions"].astype(np.int64), mask=solved["solutions"] < 0),
    }
    by_count = pc.binary_join_element_wise(pa.array(count).cast(pa.string()), "_numbers", "")
    name = pa.repeat(data_source, size) if data_source else by_count
    return pa.table(
        {
            "data_source": pc.binary_join_element_wise("countdown/", name, ""),
            "prompt": pa.ListArray.from_arrays(
                offsets, pa.StructArray.from_arrays([role, content], ["role", "content"])
            ),
            "ability": pa.repeat("math", size),
            "reward_model": pa.StructArray.from_arrays([pa.repeat("rule", size), truth], ["style", "ground_truth"]),
            "extra_info": pa.StructArray.from_arrays(list(info.values()), list(info)),
        }
    )
