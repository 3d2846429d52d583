"""Linear and LayerNorm whose weights may be stored in a narrower dtype than they compute in; Embedding beside them.

Activations decide the arithmetic: a weight is widened to their dtype. CPUs have no fp16 arithmetic, so there fp16 is
a storage format and activations are fp32: closer to the truth than fp16 sums, and faster, because widening a few rows
at a time stays in the cache (measured on 2 Zen 4 cores, 16,384 × 4,096: one token 8.8 ms against 13.8 native fp16 and
12.6 fp32; 512 tokens 391 against 3,445 and 793).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 20
"""Weights widened at once: 4 MB of fp32, which the second and third level caches hold."""

FEW_TOKENS = 8
"""Up to this many tokens a CPU is faster with widened bf16 rows than with its own bf16 product."""


def activation_dtype(weight_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of hidden states: fp32 for fp16 weights on a CPU, else that of the weights."""
    return torch.float32 if device.type == "cpu" and weight_dtype == torch.float16 else weight_dtype


def linear_by_rows(
    hidden: Tensor, out_features: int, widen: Callable[[int, int], Tensor], bias: Tensor | None = None
) -> Tensor:
    """Hidden [..., in] → [..., out], a few rows of the weight at a time.

    widen(start, stop) gives rows of the weight in the dtype of `hidden`, [stop - start, in].
    """
    rows = max(1, CHUNK_ELEMENTS // hidden.shape[-1])
    output = hidden.new_empty((*hidden.shape[:-1], out_features))
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        part = None if bias is None else bias[start:stop].to(hidden.dtype)
        output[..., start:stop] = functional.linear(hidden, widen(start, stop), part)
    return output


class Linear(nn.Linear):
    """nn.Linear that takes activations of any floating dtype and answers in the same."""

    def reset_parameters(self) -> None:
        """Draw nothing without memory: on the meta device that would load the whole compiler."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight
        if weight.device.type == "cpu" and not (torch.is_grad_enabled() and weight.requires_grad):
            is_narrow = hidden.dtype == torch.float32 and weight.dtype in (torch.float16, torch.bfloat16)
            tokens = hidden.numel() // max(1, hidden.shape[-1])
            if is_narrow:
                return linear_by_rows(hidden, self.out_features, lambda a, b: weight[a:b].float(), self.bias)
            if hidden.dtype == weight.dtype == torch.bfloat16 and tokens <= FEW_TOKENS:
                wide = linear_by_rows(hidden.float(), self.out_features, lambda a, b: weight[a:b].float(), self.bias)
                return wide.to(hidden.dtype)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return functional.linear(hidden, weight.to(hidden.dtype), bias)


class Embedding(nn.Embedding):
    """nn.Embedding that draws nothing on the meta device."""

    def reset_parameters(self) -> None:
        """As in Linear."""
        if not self.weight.is_meta:
            super().reset_parameters()


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that answers in the dtype of its input, whatever its own weights are stored in."""

    def forward(self, hidden: Tensor) -> Tensor:
        weight, bias = self.weight.to(hidden.dtype), self.bias.to(hidden.dtype)
        return functional.layer_norm(hidden, self.normalized_shape, weight, bias, self.eps)
