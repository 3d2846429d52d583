"""Which token of a packed row may look at which: the prefix-LM mask of every document, block-diagonal over the row.

Query i sees key j if both are of one document and `in_context[j] or j <= i`. `dense_blocked` writes the mask out and is
the slow twin; `flex_block_mask` builds FlexAttention's block mask on the device, so that no score matrix of the whole
row is held. Source: GLM (ACL 2022) §2.1; spec/training.md §1.1, §1.7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chatglm.model.attention import Attend

from .samples import PADDING, Batch


def dense_blocked(batch: Batch) -> Tensor:
    """Bool [batch, 1, query, key], True = may not look. A padding query sees itself alone."""
    document, tokens = batch.document, batch.document.shape[1]
    index = torch.arange(tokens, device=document.device)
    query, key = index[:, None], index[None, :]
    is_same = document[:, :, None] == document[:, None, :]  # [batch, query, key]
    is_real = (document != PADDING)[:, :, None]
    allowed = is_same & is_real & (batch.in_context[:, None, :] | (key <= query))
    return ~(allowed | (query == key))[:, None]


def seen_spans(batch: Batch) -> tuple[Tensor, Tensor]:
    """First key and end of the keys that each token sees, int32 [batch, tokens]: a document's tokens lie together and
    its context first, so what is seen is one span.
    """
    document, in_context = batch.document, batch.in_context
    tokens = document.shape[1]
    index = torch.arange(tokens, dtype=torch.int32, device=document.device).expand_as(document)
    is_first = torch.ones_like(in_context)
    is_first[:, 1:] = document[:, 1:] != document[:, :-1]
    start = torch.where(is_first, index, 0).cummax(dim=1).values
    breaks = torch.where(is_first | ~in_context, index, tokens)
    breaks = torch.cat((breaks[:, 1:], breaks.new_full((len(breaks), 1), tokens)), dim=1)
    context_end = breaks.flip(1).cummin(dim=1).values.flip(1)  # the first token after this one that is no context
    start = torch.where(document == PADDING, index, start)
    stop = torch.where(in_context & (document != PADDING), context_end, index + 1)
    return start.int(), stop.int()


def flex_block_mask(batch: Batch, *, prefix: int = 0, block_size: int = 128) -> Any:
    """FlexAttention's BlockMask of the same rule, made on the batch's device; blocks that see nothing are skipped.

    prefix  keys of a tuned prefix in front of the row, which every token sees
    The rule inside a block compares with two numbers of the query: one that reads numbers of every key took a H100's
    forward kernel ten times as long as its backward kernel.
    """
    from torch.nn.attention.flex_attention import BlockMask

    start, stop = seen_spans(batch)
    tokens = start.shape[1]

    def may_look(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = key - prefix
        is_seen = (place >= start[row, query]) & (place < stop[row, query])
        return is_seen | (key < prefix) if prefix else is_seen

    some, all_of_it = _seen_blocks(start, stop, prefix, block_size)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~all_of_it),
        *_listed(all_of_it),
        BLOCK_SIZE=block_size,
        mask_mod=may_look,
        seq_lengths=(tokens, prefix + tokens),
    )


def _seen_blocks(start: Tensor, stop: Tensor, prefix: int, size: int) -> tuple[Tensor, Tensor]:
    """Whether some query of a block sees some key of another, and all see all: bool [batch, 1, query, key blocks]."""
    tokens = start.shape[1]
    begins = torch.arange(0, prefix + tokens, size, device=start.device)
    ends = begins + size
    first, last = (start + prefix)[..., None], (stop + prefix)[..., None]  # [batch, tokens, 1]
    first = torch.where(first <= prefix, 0, first) if prefix else first  # one span with the prefix in front of it
    some = ((first < ends) & (last > begins)) | (begins < prefix)
    every = ((first <= begins) & (last >= ends)) | (ends <= prefix)
    some, every = (
        nn.functional.pad(seen, (0, 0, 0, -tokens % size)).unflatten(1, (-1, size)) for seen in (some, every)
    )
    return some.any(dim=2)[:, None], every.all(dim=2)[:, None]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and which, those first: int32."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1).int(), order.int()


def flex_attend(block_mask: Any, *, compiled: bool = True) -> Attend:
    """An `Attend` for `model.transformer(…, attend=…)` that uses a block mask and ignores `blocked`.

    compiled  FlexAttention is a fast kernel only when compiled; uncompiled it holds the whole score matrix
    """
    flex = _flex_attention(compiled)

    def attend(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None) -> Tensor:
        mixed: Tensor = flex(query, key, value, block_mask=block_mask)
        return mixed

    attend.has_mask = True  # type: ignore[attr-defined]  # the loss need not write the dense mask out
    return attend


_kernels: dict[bool, Callable[..., Any]] = {}


def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if compiled not in _kernels:
        kernel: Any = flex_attention
        _kernels[compiled] = torch.compile(kernel, dynamic=False) if compiled else kernel
    return _kernels[compiled]
