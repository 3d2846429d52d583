"""What the ranks exchange: two sums a layer, and the head's parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from ..model import GLM
from ..model.block import Block
from .group import ProcessGroup


def connect(model: GLM, group: ProcessGroup) -> None:
    """Let the shards of a loaded model work as one: sums behind linears split by input, a head split by vocabulary."""
    for layer in model.transformer.layers:
        assert isinstance(layer, Block)
        for linear in (layer.attention.dense, layer.mlp.dense_4h_to_h):
            linear.register_forward_hook(_SumOverRanks(group))
    if model.config.tied_head and not model.config.quantization_embeddings:
        model.lm_head = VocabularyShardedHead(model.lm_head.weight, group)  # type: ignore[assignment]


class _SumOverRanks:
    """A forward hook: partial products → their sum on every rank, in fp32."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        total = output.float()
        torch.distributed.all_reduce(total, group=self.group.handle)
        return total.to(output.dtype)


class VocabularyShardedHead(nn.Module):
    """The output head: each rank scores its rows of the (whole, shared) embedding; every rank gets all scores."""

    def __init__(self, weight: Tensor, group: ProcessGroup) -> None:
        super().__init__()
        self.group = group
        rows = -(-weight.shape[0] // group.world_size)
        self.vocab = weight.shape[0]
        self.rows = rows
        self.weight = weight[group.rank * rows : (group.rank + 1) * rows]  # a view: nothing is copied

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] → [..., vocab]."""
        part = hidden.new_zeros((*hidden.shape[:-1], self.rows))  # the last rank may have fewer rows
        part[..., : self.weight.shape[0]] = nn.functional.linear(hidden, self.weight.to(hidden.dtype))
        parts = [torch.empty_like(part) for _ in range(self.group.world_size)]
        torch.distributed.all_gather(parts, part, group=self.group.handle)
        return torch.cat(parts, dim=-1)[..., : self.vocab]
