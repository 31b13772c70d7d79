"""`torch_varlen`: attention over packed sequences by the FlashAttention kernels that torch itself carries.

flash-attn has no wheel on PyPI, and compiling it takes an hour. torch 2.11 has the same kernels built in, as
torch.nn.attention.varlen. transformers calls what is registered here if a model's `attn_implementation` is
`torch_varlen`.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "torch_varlen"


@lru_cache(maxsize=1)  # all layers of a pass share their positions, and the length of the longest waits for the GPU
def sequences(position_ids: Tensor, mask: Tensor | None, rows: int) -> tuple[Tensor | None, Tensor, list[int]]:
    """Where sequences begin and end in a batch whose rows may hold several, one after another.

    Args:
        position_ids: shape (rows or 1, tokens). A sequence begins at each 0, and at the first token of a row.
        mask: whether a token is one of a sequence or padding, shape (rows, tokens); None if there is no padding.
        rows: of the batch.

    Returns:
        indices of the tokens that are no padding, in the flattened batch; None for all of them;
        borders in what they select, from 0 to its length, shape (sequences + 1,), int32;
        the length of each sequence.
    """
    begins = (position_ids == 0).repeat(rows // len(position_ids), 1)
    begins[:, 0] = True
    where = None
    if mask is not None:
        mask = mask.bool()
        begins = mask & (begins | (mask.cumsum(1) == 1))
        where = mask.flatten().nonzero().squeeze(1)
    flat = begins.flatten() if where is None else begins.flatten()[where]
    borders = torch.cat([flat.nonzero().squeeze(1), flat.new_full((1,), len(flat), dtype=torch.long)])
    return where, borders.int(), borders.diff().tolist()


def kernel(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, lengths: list[int], scale: float, window: int | None
) -> Tensor:
    """Causal attention within each sequence, on a GPU; shapes as in `one_by_one`."""
    from torch.nn.attention.varlen import varlen_attn

    longest, attend = max(lengths), cast(Callable[..., Tensor], varlen_attn)
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 takes fewer heads of keys as they are
        attend = partial(attend, enable_gqa=True)
    before = window - 1 if window else -1  # the window counts the token itself, and the kernel does not
    return attend(query, key, value, borders, borders, longest, longest, scale=scale, window_size=(before, 0))


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, window: int | None
) -> Tensor:
    """The same, a sequence at a time: for a CPU and for fp32, which the kernels do not take.

    Args:
        query, key, value: shape (tokens, heads, head dimension); of keys and values there may be fewer heads.
        lengths: of each sequence.
        scale: of the scores.
        window: the tokens that one attends to, itself included; None for all before it.

    Returns:
        Shape (tokens, heads of the queries, head dimension).
    """

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask, length = None, query.shape[2]
        if window and window < length:
            mask = query.new_ones((length, length), dtype=torch.bool).tril().triu(1 - window)
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )

    split = (each.transpose(0, 1).unsqueeze(0).split(lengths, 2) for each in (query, key, value))
    return torch.cat([attend(*part) for part in zip(*split, strict=True)], 2).squeeze(0).transpose(0, 1)


def torch_varlen(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' AttentionInterface calls it, for training: causal, and within each sequence.

    Args:
        query, key, value: shape (rows, heads, tokens, head dimension); of keys and values there may be fewer heads.
        attention_mask: shape (rows, tokens), as flash_attention_mask makes it: None if there is no padding.
        position_ids: shape (rows or 1, tokens).

    Returns:
        Shape (rows, tokens, heads, head dimension), zero at padding; and None for the weights.

    Raises:
        ValueError: for what the model asks of attention and this one does not do.
    """
    rows, heads, tokens, width = query.shape
    if position_ids is None or key.shape[2] != tokens or not getattr(module, "is_causal", True):
        raise ValueError(f"{NAME} is for training decoders that hand position_ids to their layers, without a cache")
    where, borders, lengths = sequences(position_ids, attention_mask, rows)
    asked = {"dropout": dropout or None, "softcap": kwargs.get("softcap"), "s_aux": kwargs.get("s_aux")}
    if unknown := [name for name, given in asked.items() if given is not None]:
        raise ValueError(f"{NAME} has no {', '.join(unknown)}; set attn_implementation to flash_attention_2 or sdpa")
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # an adapter or a rotary embedding may have made it fp32
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if where is not None:
        query, key, value = query[where], key[where], value[where]
    scale = width**-0.5 if scaling is None else scaling
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        output = kernel(query, key, value, borders, lengths, scale, sliding_window)
    else:
        output = one_by_one(query, key, value, lengths, scale, sliding_window)
    if where is not None:
        output = output.new_zeros((rows * tokens, heads, width)).index_copy(0, where, output)
    return output.view(rows, tokens, heads, width), None


def register() -> None:
    """Make the name known to transformers, in this process."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    AttentionInterface.register(NAME, torch_varlen)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
