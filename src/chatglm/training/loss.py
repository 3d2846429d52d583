"""Cross entropy at the positions that have a target, without ever holding all their logits.

Sum and count are kept apart: the mean is over the loss positions of the **global** batch, so that accumulation and the
number of processes do not change the gradient (spec/training.md §1.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from chatglm.model.attention import Attend, plain_attention

from .head_loss import has_plain_head, plain_head_losses
from .masks import dense_blocked
from .samples import IGNORE, Batch

CHUNK_BYTES = 1 << 28
"""Logits held at once: 256 MB, which is 514 positions of ChatGLM-6B's 130,528 rows in fp32, 1,028 in bf16."""


class Trainable(Protocol):
    """What the loss asks of a model: GLM has it."""

    @property
    def transformer(self) -> nn.Module: ...

    @property
    def config(self) -> object: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LossSum:
    """Sum of losses (fp32 scalar, with gradient) and number of positions; add those of micro-batches and processes."""

    total: Tensor
    count: int

    def mean(self) -> Tensor:
        """Loss for a position; 0 where there is none."""
        return self.total / max(1, self.count)


def loss_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and token of every position with a target, in order, each int64 [n]."""
    rows, tokens = torch.nonzero(batch.targets != IGNORE, as_tuple=True)
    return rows, tokens


def token_losses(
    model: Trainable,
    batch: Batch,
    *,
    blocked: Tensor | None = None,
    attend: Attend = plain_attention,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Losses in nats at the loss positions of a batch, fp32 [n], in the order of `loss_positions`.

    blocked  None: `dense_blocked(batch)`, or nothing where `attend` brings its own mask (masks.flex_attend)
    """
    hidden = hidden_states(model, batch, blocked=blocked, attend=attend)
    targets = batch.targets.flatten()
    places = torch.nonzero(targets != IGNORE)[:, 0]
    wanted = hidden.flatten(0, 1).index_select(0, places)  # its gradient is a plain sum, a mask's would sort first
    return head_losses(model, wanted, targets[places], chunk_bytes)


def batch_loss(
    model: Trainable,
    batch: Batch,
    *,
    blocked: Tensor | None = None,
    attend: Attend = plain_attention,
    chunk_bytes: int = CHUNK_BYTES,
) -> LossSum:
    """Sum and count over the loss positions of one micro-batch."""
    losses = token_losses(model, batch, blocked=blocked, attend=attend, chunk_bytes=chunk_bytes)
    return LossSum(losses.sum(), losses.numel())


def hidden_states(
    model: Trainable, batch: Batch, *, blocked: Tensor | None = None, attend: Attend = plain_attention
) -> Tensor:
    """Hidden states [batch, tokens, hidden] of a batch under its mask."""
    is_1d = getattr(model.config, "position_encoding", "rotary_2d") == "rotary_1d"
    positions = batch.positions[:, 0] if is_1d else batch.positions
    mask = dense_blocked(batch) if blocked is None and not getattr(attend, "has_mask", False) else blocked
    hidden: Tensor = model.transformer(batch.ids, positions, mask, attend=attend)
    return hidden


def head_losses(model: Trainable, hidden: Tensor, targets: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Losses fp32 [n] of hidden states [n, hidden] against targets [n].

    The head runs over as many positions at once as `chunk_bytes` hold logits; where gradients are wanted a chunk's
    logits are computed again in the backward pass instead of being kept.
    """
    vocab = int(getattr(model.config, "vocab_size", 1))
    rows = max(1, chunk_bytes // (vocab * hidden.element_size()))
    if len(targets) == 0:
        return hidden.sum(dim=-1).float()  # [0], still part of the graph
    if has_plain_head(model):
        return plain_head_losses(hidden, model.lm_head.weight, targets, rows)  # type: ignore[attr-defined]
    needs_gradient = torch.is_grad_enabled() and len(targets) > rows

    def losses(part: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(model.logits(part), wanted, reduction="none")

    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    if not needs_gradient:
        return torch.cat([losses(part, wanted) for part, wanted in chunks])
    return torch.cat(
        [checkpoint(losses, part, wanted, use_reentrant=False, preserve_rng_state=False) for part, wanted in chunks]
    )
