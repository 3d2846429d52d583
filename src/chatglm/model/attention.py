"""Multi-head attention over a prefix-LM mask.

`plain_attention` is the reference: scores and softmax in fp32, a blocked place gets the lowest finite score, so a row
that is blocked everywhere attends evenly instead of becoming NaN. The original divides the query by (layer + 1) and
multiplies the fp32 scores back, to stay inside fp16; with fp32 scores both factors cancel (spec/chatglm-6b.md §3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import ModelConfig
from .linear import Linear
from .rotary import Rotary, rotate

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(query, key, value, blocked) → mixed values; heads are [batch, heads, tokens, head_dim]."""

KeyValue = tuple[Tensor, Tensor]


class Cache(Protocol):
    """What the network asks of a KV cache; the engine and the transformers classes each have their own."""

    @property
    def length(self) -> int:
        """Tokens held for every sequence of the batch; 0 before the first pass."""
        ...

    def update(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Store new keys and values [batch, heads, tokens, head_dim]; return all that the layer may look at."""
        ...


def attention_weights(query: Tensor, key: Tensor, blocked: Tensor | None) -> Tensor:
    """Softmax of the scaled scores, fp32 [batch, heads, query, key]."""
    scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
    if blocked is not None:
        scores = scores.masked_fill(blocked, torch.finfo(torch.float32).min)
    weights: Tensor = scores.softmax(dim=-1)
    return weights


def plain_attention(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None) -> Tensor:
    """Attention as the paper writes it, weights and sums in fp32. The slow twin of every other `Attend`."""
    return (attention_weights(query, key, blocked) @ value.float()).to(query.dtype)


FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""All of PyTorch's but cuDNN's, which plans anew for every new length: 0.1 s each on an H100, where the others take
microseconds."""


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None) -> Tensor:
    """PyTorch's fused attention: no score matrix in memory. A row blocked everywhere has no defined value."""
    allowed = None if blocked is None else ~blocked
    if not query.is_cuda:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    with sdpa_kernel(list(FUSED)):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


class Attention(nn.Module):
    """query_key_value → heads → rotary → cache → attend → dense. Source: GLM-130B §2; spec/chatglm-6b.md §3.2."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.qkv_layout = config.qkv_layout
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, tokens, 3 * hidden] → query, key, value, each [batch, heads, tokens, head_dim]."""
        if self.qkv_layout == "per_head":  # head 0: q, k, v; head 1: q, k, v; …
            parts = qkv.unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(-2)
        else:  # all q, all k, all v
            parts = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        query, key, value = (part.transpose(1, 2) for part in parts)
        return query, key, value

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary | None,
        blocked: Tensor | None,
        cache: Cache | None = None,
        prefix: KeyValue | None = None,
        attend: Attend = plain_attention,
    ) -> Tensor:
        """[batch, query, hidden] → the same. A prefix (P-tuning v2) goes in front unturned; `blocked` covers it."""
        query, key, value = self.split_heads(self.query_key_value(hidden))
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if prefix is not None:
            key, value = torch.cat((prefix[0], key), dim=2), torch.cat((prefix[1], value), dim=2)
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        mixed = attend(query, key, value, blocked)  # [batch, heads, query, head_dim]
        output: Tensor = self.dense(mixed.transpose(1, 2).flatten(2))
        return output
