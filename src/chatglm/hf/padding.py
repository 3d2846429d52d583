"""Mask and positions that the original's tokenizer puts beside padded ids, and the padding itself.

NumPy arrays of one example, without a batch axis. Source: spec/chatglm-6b.md §5.5.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tokenizer import Tokenizer


def add_mask_and_positions(example: MutableMapping[str, Any], tokenizer: Tokenizer, *, with_mask: bool) -> None:
    """Put `attention_mask` and `position_ids` of the unpadded ids into `example` where they are missing.

    The context ends before the first `<sop>`, or is everything where there is none. Positions behind it stand at the
    first `[MASK]`, else at the first `[gMASK]`: here the original's tokenizer prefers `[MASK]`, its model `[gMASK]`.
    """
    ids = list(example["input_ids"])
    length = len(ids)
    context = ids.index(tokenizer.sop_id) if tokenizer.sop_id in ids else length
    index = np.arange(length)
    if with_mask and "attention_mask" not in example:
        blocked = (index[None, :] > index[:, None]) & (index[None, :] >= context)  # [query, key]
        example["attention_mask"] = blocked[None]
    if "position_ids" not in example:
        place = next((ids.index(mask) for mask in (tokenizer.mask_id, tokenizer.gmask_id) if mask in ids), None)
        positions = index if place is None else np.where(index < context, index, place)
        block_positions = np.maximum(index - context + 1, 0)
        example["position_ids"] = np.stack((positions, block_positions))


def pad_left(example: MutableMapping[str, Any], count: int, *, pad_id: int) -> None:
    """Put `count` filler tokens in front of every field of `example` that has one entry a token."""
    if "attention_mask" in example:
        example["attention_mask"] = _padded_mask(np.asarray(example["attention_mask"]), count)
    if "position_ids" in example:
        positions = np.asarray(example["position_ids"])  # [2, tokens], or [tokens]
        example["position_ids"] = np.pad(positions, [(0, 0)] * (positions.ndim - 1) + [(count, 0)])
    if "token_type_ids" in example:
        example["token_type_ids"] = [0] * count + list(example["token_type_ids"])
    if "special_tokens_mask" in example:
        example["special_tokens_mask"] = [1] * count + list(example["special_tokens_mask"])
    example["input_ids"] = [pad_id] * count + list(example["input_ids"])


def _padded_mask(mask: NDArray[Any], count: int) -> NDArray[Any]:
    """Padding sees nothing and is not seen; a plain 1/0 mask [tokens] gets zeros."""
    if mask.ndim == 1:
        return np.pad(mask, (count, 0))
    return np.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(count, 0), (count, 0)], constant_values=True)
