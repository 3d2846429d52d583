"""Rotary positions in one and two dimensions.

2-D: the first half of each head turns with the position, the second with the block position. 1-D: the whole head
turns with the position. Pairs are (j, j + dim/2), not neighbours. Frequencies are rounded to fp16 in every dtype, as
the checkpoints were trained; angles, cosines and the rotation itself are fp32 (the original's fp16 and bf16 angles
lose positions).

Source: RoFormer §3.4; spec/chatglm-6b.md §3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ModelConfig


class Rotary(NamedTuple):
    """Cosines and sines for one pass, both fp32 [batch, 1, tokens, streams, dim / 2]; streams is 1 or 2."""

    cos: Tensor
    sin: Tensor


def rotary_frequencies(dim: int, base: float, device: torch.device) -> Tensor:
    """base^(-2j/dim) for j = 0 … dim/2 - 1, rounded to fp16, fp32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return (1.0 / base**exponents).half().float()


def rotary_table(positions: Tensor, config: ModelConfig) -> Rotary:
    """The rotation of each token. positions: int64 [batch, 2, tokens] (2-D) or [batch, tokens] (1-D)."""
    if config.position_encoding == "rotary_1d":
        positions = positions[:, None]
    streams = positions.shape[1]
    frequencies = rotary_frequencies(config.head_dim // streams, config.rotary_base, positions.device)
    angles = positions.transpose(1, 2)[:, None, :, :, None].float() * frequencies  # [batch, 1, tokens, streams, dim/2]
    return Rotary(angles.cos(), angles.sin())


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys [batch, heads, tokens, head_dim]; same shape and dtype out."""
    streams = rotary.cos.shape[-2]
    first, second = heads.float().unflatten(-1, (streams, 2, -1)).unbind(-2)  # each [..., streams, dim/2]
    turned = torch.stack((first * rotary.cos - second * rotary.sin, second * rotary.cos + first * rotary.sin), dim=-2)
    return turned.flatten(-3).to(heads.dtype)
