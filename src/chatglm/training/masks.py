"""Which token of a packed row may look at which: the prefix-LM mask of every document, block-diagonal over the row.

Query i sees key j if both are of one document and `in_context[j] or j <= i`. `dense_blocked` writes the mask out and is
the slow twin; `flex_block_mask` builds FlexAttention's block mask on the device, so that no score matrix of the whole
row is held. Source: GLM (ACL 2022) §2.1; spec/training.md §1.1, §1.7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


def flex_block_mask(batch: Batch, *, prefix: int = 0, block_size: int = 128) -> Any:
    """FlexAttention's BlockMask of the same rule, made on the batch's device; blocks that see nothing are skipped.

    prefix  keys of a tuned prefix in front of the row, which every token sees
    """
    from torch.nn.attention.flex_attention import create_block_mask

    document, in_context = batch.document, batch.in_context
    rows, tokens = document.shape

    def may_look(row: Tensor, _head: Tensor, query: Tensor, place: Tensor) -> Tensor:
        key = (place - prefix).clamp(min=0) if prefix else place
        is_same = (document[row, query] == document[row, key]) & (document[row, query] != PADDING)
        allowed = (is_same & (in_context[row, key] | (key <= query))) | (query == key)
        return allowed | (place < prefix) if prefix else allowed

    return create_block_mask(
        may_look, rows, None, tokens, prefix + tokens, device=str(document.device), BLOCK_SIZE=block_size
    )


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
