"""P-tuning v2: learned keys and values in front of every layer.

Source: P-Tuning v2 (ACL 2022) §3; spec/chatglm-6b.md §8.1. The prefix keys are not turned by the rotary, and
positions of the tokens stay as without a prefix; every token sees the whole prefix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .attention import KeyValue
from .linear import Embedding

PREFIX_DROPOUT = 0.1


class PrefixEncoder(nn.Module):
    """`pre_seq_len` learned vectors per layer, straight from a table or through a two-layer projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.pre_seq_len is None:
            raise ValueError("a prefix encoder needs config.pre_seq_len")
        self.length = config.pre_seq_len
        self.num_layers, self.num_heads, self.head_dim = config.num_layers, config.num_heads, config.head_dim
        width = config.num_layers * 2 * config.hidden_size
        self.dropout = nn.Dropout(PREFIX_DROPOUT)
        if config.prefix_projection:
            self.embedding = Embedding(self.length, config.hidden_size)
            self.trans: nn.Module = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, width)
            )
        else:
            self.embedding = Embedding(self.length, width)
            self.trans = nn.Identity()

    def forward(self) -> Tensor:
        """The prefix in its own dtype, [prefix, num_layers * 2 * hidden]."""
        places = torch.arange(self.length, device=self.embedding.weight.device)
        output: Tensor = self.trans(self.embedding(places))
        return output

    def key_values(self, batch: int, dtype: torch.dtype) -> Iterator[KeyValue]:
        """For each layer its prefix key and value, both [batch, heads, prefix, head_dim] in `dtype`."""
        table = self.forward().to(dtype).expand(batch, -1, -1)
        table = self.dropout(table.unflatten(-1, (2 * self.num_layers, self.num_heads, self.head_dim)))
        table = table.permute(2, 0, 3, 1, 4)  # [2 * layers, batch, heads, prefix, head_dim]
        for layer in range(self.num_layers):
            yield table[2 * layer], table[2 * layer + 1]
