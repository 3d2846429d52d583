"""Cross entropy of a head's logits with a gradient of its own: neither logits nor casts of the weight are made twice.

A head is wide (130,528 rows in ChatGLM-6B). Written as linear and cross entropy, every chunk of positions casts the
fp32 weight anew, sums the weight's gradient in the narrow dtype, and passes over fp32 logits many times. Here the
weight is cast once a micro-batch, its gradient is summed in fp32, and on a GPU what lies between the products is one
compiled kernel. Logits are made again in the backward pass, a chunk at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.probe import why_not_triton
from ..model.linear import Linear


def has_plain_head(model: object) -> bool:
    """Whether the head is one matrix in this process: not quantised, not shared over processes, without a bias."""
    head = getattr(model, "lm_head", None)
    return type(head) is Linear and type(head.weight) in (nn.Parameter, Tensor) and head.bias is None


def plain_head_losses(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    """Losses in nats, fp32 [n] (fp64 for fp64), of hidden states [n, hidden] against int64 targets [n].

    weight  [vocab, hidden], of any floating dtype; its gradient is summed in that dtype
    rows    positions whose logits are held at once
    """
    losses: Tensor = _HeadLosses.apply(hidden, weight, targets, rows)  # type: ignore[no-untyped-call]
    return losses


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        narrow = weight.to(hidden.dtype)
        normalise, _ = _between_products(hidden.device)
        made = [
            normalise(part @ narrow.T, wanted)
            for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        normalisers = torch.cat([normaliser for normaliser, _ in made])
        ctx.save_for_backward(hidden, narrow, targets, normalisers)
        ctx.rows, ctx.weight_dtype = rows, weight.dtype
        return normalisers - torch.cat([score for _, score in made])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, narrow, targets, normalisers = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        _, differentiate = _between_products(hidden.device)
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(narrow, dtype=ctx.weight_dtype) if wants_weight else None
        for start in range(0, len(hidden), ctx.rows):
            span = slice(start, start + ctx.rows)
            of_logits = differentiate(hidden[span] @ narrow.T, normalisers[span], targets[span], gradient[span])
            if of_hidden is not None:
                torch.mm(of_logits, narrow, out=of_hidden[span])
            if of_weight is not None:
                _add_product(of_weight, of_logits.T, hidden[span])
        return of_hidden, of_weight, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total += left @ right; narrow factors are summed in the wider dtype of the total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.add_(left @ right)


def _normalise(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the sum of exponentials, and the score of the target, each fp32 [n], of logits [n, vocab]."""
    wide = _widened(logits)
    return wide.logsumexp(dim=-1), wide.gather(1, targets[:, None])[:, 0]


def _differentiate(logits: Tensor, normalisers: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the logits [n, vocab], in their dtype: (softmax - one at the target) times that of the loss."""
    shares = (_widened(logits) - normalisers[:, None]).exp()
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    return ((shares - is_target.to(shares.dtype)) * gradient[:, None]).to(logits.dtype)


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _between_products(device: torch.device) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both functions; compiled where Triton can build."""
    return _compiled() if why_not_triton(device) is None else (_normalise, _differentiate)


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    return torch.compile(_normalise, dynamic=True), torch.compile(_differentiate, dynamic=True)
