"""What a caller of the transformers classes may give, as the mask and positions the network takes.

The original takes a bool mask [batch, 1, query, key] with True = blocked and 2-D positions [batch, 2, tokens];
transformers' own tools give a mask [batch, tokens] with 1 = real token. What is missing is found by searching the ids,
as in the original; `chat` and `generate` search only once, in the context. Source: spec/chatglm-6b.md §3.7, §4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig
from ..model.positions import Layout, find_layout, positions, prefix_blocked


@dataclass(frozen=True)
class NetworkInputs:
    """positions: int64 [batch, 2, query] or [batch, query] (1-D); blocked: bool [batch or 1, 1, query, key] or None."""

    positions: Tensor
    blocked: Tensor | None


def left_padding(mask: Tensor) -> Tensor:
    """Filler tokens before each row, int64 [batch], from either form of mask."""
    is_padding = mask == 0 if mask.dim() == 2 else blocked_mask(mask)[:, 0].all(dim=1)  # columns that no row may see
    return is_padding.long().cumprod(dim=1).sum(dim=1)


def blocked_mask(mask: Tensor) -> Tensor:
    """A 4-D mask as bool [batch, 1, query, key], True = blocked.

    Takes the original's bool mask, with or without the axis for heads, and an additive float mask (0 = may look).
    Raises ValueError for integers, where 1 could mean either.
    """
    if mask.dim() == 3:
        mask = mask[:, None]
    if mask.dim() != 4:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; give [batch, 1, query, key] or [batch, tokens]"
        )
    if mask.is_floating_point():
        return mask < 0
    if mask.dtype != torch.bool:
        raise ValueError(f"attention_mask [batch, 1, query, key] is {mask.dtype}; give bool, where True means blocked")
    return mask


def first_pass(
    ids: Tensor | None, mask: Tensor | None, given: Tensor | None, config: ModelConfig, tokens: int
) -> NetworkInputs:
    """Mask and positions for a pass without a cache; `mask` and `given` positions as the caller has them, or None.

    Raises ValueError when something must be found in the ids and there are none, or they lack `<sop>` or a mask token.
    """
    is_full = mask is not None and mask.dim() > 2
    if is_full and given is not None:
        assert mask is not None
        return NetworkInputs(given, blocked_mask(mask))
    if ids is None:
        raise ValueError(
            "inputs_embeds needs position_ids and a [batch, 1, query, key] attention_mask beside it: "
            "there are no ids to find them in"
        )
    layout = find_layout(ids, config, None if mask is None else left_padding(mask))
    found = positions(layout, tokens, config) if given is None else given
    if is_full:
        assert mask is not None
        return NetworkInputs(found, blocked_mask(mask))
    return NetworkInputs(found, padded_blocked(layout, tokens, mask))


def padded_blocked(layout: Layout, tokens: int, mask: Tensor | None) -> Tensor:
    """The prefix-LM mask, bool [batch, 1, tokens, tokens]; what a 1/0 mask [batch, tokens] takes out is blocked too."""
    blocked = prefix_blocked(layout, tokens)
    if mask is None:
        return blocked
    if mask.shape[-1] != tokens:
        raise ValueError(f"attention_mask covers {mask.shape[-1]} tokens, input_ids have {tokens}")
    return blocked | (mask == 0)[:, None, None, :]


def later_pass(mask: Tensor | None, given: Tensor | None, queries: int, held: int, prefix: int) -> NetworkInputs:
    """Mask and positions for `queries` tokens over a cache that holds `held`, a P-tuning prefix of `prefix` counted.

    Without a mask nothing is blocked, as in the original; a mask may count the prefix or leave it out.
    """
    if given is None:
        raise ValueError(
            "position_ids must be given beside past_key_values: new tokens alone do not tell where they stand"
        )
    if mask is None:
        return NetworkInputs(given, None)
    key = held + queries
    if mask.dim() == 2:
        blocked = (mask == 0)[:, None, None, :].expand(-1, -1, queries, -1)
        if queries > 1:
            later = torch.ones(queries, mask.shape[-1], dtype=torch.bool, device=mask.device)
            blocked = blocked | later.triu(mask.shape[-1] - queries + 1)
    else:
        blocked = blocked_mask(mask)
        blocked = blocked[:, :, -queries:]
    if blocked.shape[-1] == key - prefix:
        blocked = torch.nn.functional.pad(blocked, (prefix, 0), value=False)
    if blocked.shape[-1] not in (1, key):
        raise ValueError(
            f"attention_mask covers {mask.shape[-1]} tokens; {held} in the cache and {queries} new make {key}"
        )
    return NetworkInputs(given, blocked)
