"""One layer: attention and feed-forward, each with its norm and residual.

ChatGLM-6B and GLM-130B take the residual from the **normalised** input, times √(2·layers): the post-LN of DeepNorm
written one norm earlier. GLM (ACL 2022) is pre-LN with a plain residual. Source: DeepNet §2; GLM-130B §2.1;
spec/chatglm-6b.md §3.1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ..config import ModelConfig
from .attention import Attend, Attention, Cache, KeyValue, plain_attention
from .linear import LayerNorm, Linear
from .rotary import Rotary


class FeedForward(nn.Module):
    """hidden → inner → hidden, with a tanh GELU (ChatGLM, GLM) or GeGLU with the exact GELU (GLM-130B)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_gated = config.mlp == "geglu"
        width = config.inner_hidden_size * (2 if self.is_gated else 1)
        self.dense_h_to_4h = Linear(config.hidden_size, width)
        self.dense_4h_to_h = Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.dense_h_to_4h(hidden)  # [batch, tokens, inner]
        if self.is_gated:
            plain, gate = inner.chunk(2, dim=-1)
            inner = plain * functional.gelu(gate)
        else:
            inner = functional.gelu(inner, approximate="tanh")
        output: Tensor = self.dense_4h_to_h(inner)
        return output


class Block(nn.Module):
    """LN → attention → residual → LN → feed-forward → residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.residual_is_normalised = config.norm_order == "post_scaled"
        self.residual_scale = config.residual_scale if self.residual_is_normalised else 1.0
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = FeedForward(config)

    def add_residual(self, hidden: Tensor, normalised: Tensor, branch: Tensor) -> Tensor:
        """The residual sum: branch + scale · normalised, or branch + hidden in a pre-LN model."""
        if self.residual_is_normalised:
            return branch + self.residual_scale * normalised
        return branch + hidden

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary | None,
        blocked: Tensor | None,
        cache: Cache | None = None,
        prefix: KeyValue | None = None,
        attend: Attend = plain_attention,
    ) -> Tensor:
        """[batch, query, hidden] → the same."""
        normalised = self.input_layernorm(hidden)
        hidden = self.add_residual(
            hidden, normalised, self.attention(normalised, rotary, blocked, cache, prefix, attend)
        )
        normalised = self.post_attention_layernorm(hidden)
        return self.add_residual(hidden, normalised, self.mlp(normalised))
