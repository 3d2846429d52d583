"""Ways to attend that the transformers classes choose from: fused on accelerators, and one that keeps its weights."""

from __future__ import annotations

from torch import Tensor

from ..model.attention import Attend, attention_weights, sdpa_attention


def fused_attention(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None) -> Tensor:
    """PyTorch's fused attention. Padding, which may see nothing, sees everything: its value must stay a number."""
    if blocked is not None:
        blocked = blocked & ~blocked.all(dim=-1, keepdim=True)
    return sdpa_attention(query, key, value, blocked)


def recording_attention(weights: list[Tensor]) -> Attend:
    """The plain attention, which also appends its weights [batch * heads, query, key] to a list."""

    def attend(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None) -> Tensor:
        softmax = attention_weights(query, key, blocked)  # fp32 [batch, heads, query, key]
        weights.append(softmax.to(query.dtype).flatten(0, 1))
        return (softmax @ value.float()).to(query.dtype)

    return attend
