"""Masks and position ids of the prefix-LM, from known lengths.

A sequence is `padding | context … [gMASK] | <sop> answer`. The context sees all of itself; `<sop>` and the answer see
the context and what stands before them. Nothing here reads token ids: what a user types can never move the border.
`find_layout` alone searches ids, for callers that hold nothing else (the transformers classes, training samples).

Source: GLM (ACL 2022) §2.1 and §2.2; spec/chatglm-6b.md §4 for padding and edge values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """Where the parts of each sequence of a batch lie. All tensors [batch], counted without padding.

    context_lengths   int64   tokens before `<sop>`, the mask token included
    mask_places       int64   index of the `[gMASK]` or `[MASK]` to be filled
    is_gmask          bool    whether that mask is a `[gMASK]`
    left_padding      int64   filler tokens before the sequence
    """

    context_lengths: Tensor
    mask_places: Tensor
    is_gmask: Tensor
    left_padding: Tensor

    @classmethod
    def of_contexts(cls, lengths: list[int], *, total: int, device: torch.device | str = "cpu") -> Layout:
        """Contexts that end in `[gMASK]` and are followed by one `<sop>`, left-padded to `total` tokens."""
        context = torch.tensor(lengths, dtype=torch.int64, device=device)
        gmask = torch.ones_like(context, dtype=torch.bool)
        return cls(context, context - 1, gmask, total - context - 1)


def find_layout(ids: Tensor, config: ModelConfig, left_padding: Tensor | None = None) -> Layout:
    """Search ids [batch, tokens] for the first `<sop>` and the mask it fills (`[gMASK]` before `[MASK]`).

    Raises ValueError naming the row and the id that is missing.
    """

    def first(token: int) -> tuple[Tensor, Tensor]:
        hits = ids == token
        return hits.any(dim=1), hits.int().argmax(dim=1)

    has_sop, sop = first(config.bos_token_id)
    has_gmask, gmask = first(config.gmask_token_id)
    has_mask, mask = first(config.mask_token_id)
    for row, found in enumerate(has_sop.tolist()):
        if not found:
            raise ValueError(f"row {row} holds no <sop> (id {config.bos_token_id}); a context ends in [gMASK] <sop>")
    for row, found in enumerate((has_gmask | has_mask).tolist()):
        if not found:
            raise ValueError(
                f"row {row} holds neither [gMASK] (id {config.gmask_token_id}) nor [MASK] (id {config.mask_token_id})"
            )
    padding = torch.zeros_like(sop) if left_padding is None else left_padding
    return Layout(sop - padding, torch.where(has_gmask, gmask, mask) - padding, has_gmask, padding)


def prefix_blocked(layout: Layout, total: int) -> Tensor:
    """The prefix-LM mask, bool [batch, 1, total, total], True = may not look.

    Padding columns are blocked for every row and padding rows are blocked everywhere.
    """
    index = torch.arange(total, device=layout.context_lengths.device) - layout.left_padding[:, None]  # [batch, total]
    query, key = index[:, :, None], index[:, None, :]
    allowed = (key < layout.context_lengths[:, None, None]) | (key <= query)
    allowed = allowed & (key >= 0) & (query >= 0)
    return ~allowed[:, None]


def positions(layout: Layout, total: int, config: ModelConfig, *, start: int = 0) -> Tensor:
    """Position ids of tokens `start … total - 1` of padded rows, the way training numbers them.

    returns  int64 [batch, 2, total - start] (position, block position), or [batch, total - start] for rotary_1d.
    Padding gets 0. In 1-D, answer positions run on after `[gMASK]` and stay at a `[MASK]`.
    """
    index = torch.arange(start, total, device=layout.context_lengths.device) - layout.left_padding[:, None]
    context, place = layout.context_lengths[:, None], layout.mask_places[:, None]
    in_answer = index >= context
    if config.position_encoding == "rotary_1d":
        return torch.where(in_answer & ~layout.is_gmask[:, None], place, index).clamp(min=0)
    position = torch.where(in_answer, place, index).clamp(min=0)
    block_position = (index - context + 1).clamp(min=0)
    return torch.stack((position, block_position), dim=1)


def generation_positions(layout: Layout, total: int, config: ModelConfig, *, start: int = 0) -> Tensor:
    """Position ids while an answer is generated: `positions`, but for ChatGLM's 1-D form.

    With `answer_positions="mask"` the original lets every token after `<sop>` stand at the mask in 1-D, also at a
    `[gMASK]` (spec/chatglm-6b.md §4.2). The same rule holds for a whole pass and for a cached step.
    """
    result = positions(layout, total, config, start=start)
    if config.position_encoding != "rotary_1d" or config.answer_positions == "running":
        return result
    index = torch.arange(start, total, device=result.device) - layout.left_padding[:, None]
    after_sop = index > layout.context_lengths[:, None]
    return torch.where(after_sop, layout.mask_places[:, None], result)
