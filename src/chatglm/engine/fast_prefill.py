"""FirstPass: contexts through FastNetwork's layers, as many layers at a time as the caller likes.

Matrix products are the library's, attention is PyTorch's fused one; norms, rotary with the cache's writes and the GELU
are the kernels'.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model import sdpa_attention
from ..model.rotary import rotary_table
from .kv_cache import KVCache

if TYPE_CHECKING:
    from .fast_network import FastNetwork


@dataclass(frozen=True)
class Rest:
    """What a linear left for the next norm: shares of its output, its bias, and the residual beside it."""

    parts: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    residual_streams: int = 1


class FirstPass:
    """Contexts laid one after the other, without padding.

    tokens, layers_left  how large it is, and what is still to be run
    """

    @torch.inference_mode()
    def __init__(
        self,
        network: FastNetwork,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        rows: list[tuple[int, int]],
        cache: KVCache,
    ) -> None:
        """Allocate what the layers write; nothing is run but the embedding.

        ids        int64 [tokens]
        positions  int64 [1, 2, tokens], or [1, tokens] for rotary_1d
        slots      int64 [tokens]: where keys and values go
        rows       for each sequence its tokens in all, and those of its context, which see each other
        """
        config = network.config
        self.network, self._slots, self._rows, self._cache = network, slots, rows, cache
        self.tokens, hidden_size = ids.shape[0], config.hidden_size
        rotary = rotary_table(positions, config)  # [1, 1, tokens, streams, half]
        self._cosines, self._sines = rotary.cos.reshape(self.tokens, -1), rotary.sin.reshape(self.tokens, -1)
        self._rest = Rest(network.embedding(ids)[None].to(network.dtype))

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=network.dtype, device=network.device)

        self._first, self._second, self._branch = (new(self.tokens, hidden_size) for _ in range(3))
        is_pre_norm = not network.is_normalised
        self._keeps = tuple(new(self.tokens, hidden_size) if is_pre_norm else None for _ in "ab")
        self._qkv, self._inner = new(self.tokens, 3 * hidden_size), new(self.tokens, config.inner_hidden_size)
        self._heads = new(3, self.tokens, config.num_heads, config.head_dim)
        self._layer = 0

    @property
    def layers_left(self) -> int:
        return len(self.network.layers) - self._layer

    @torch.inference_mode()
    def advance(self, layers: int) -> Tensor | None:
        """Run so many more layers; fp32 logits [sequences, vocab] of each one's last token once all have run."""
        for number in range(self._layer, min(self._layer + layers, len(self.network.layers))):
            self._run(number)
        self._layer = min(self._layer + layers, len(self.network.layers))
        return self._logits() if not self.layers_left else None

    def _run(self, number: int) -> None:
        network = self.network
        layer, operations = network.layers[number], network.operations
        first, second, branch, keeps = self._first, self._second, self._branch, self._keeps
        network.norm(layer.input_norm, self._rest, first, keeps[0], 1, False)
        network.product(first, layer.qkv, self._qkv)
        operations.split_heads(
            self._qkv, self._cosines, self._sines, self._cache.keys[number], self._cache.values[number], self._slots,
            self._heads, rotary_streams=network.rotary_streams, per_head=network.per_head,
        )  # fmt: skip
        network.product(prefix_lm_attention(self._heads, self._rows), layer.dense, branch)
        rest = network.rest(branch[None], layer.dense, first, 1, keeps[0])
        network.norm(layer.post_norm, Rest(rest.parts, None, rest.residual), second, keeps[1], 1, False)
        network.product(second, layer.up, self._inner)
        operations.gelu_(self._inner)
        network.product(self._inner, layer.down, branch)
        self._rest = Rest(branch[None], None, second if keeps[1] is None else keeps[1])

    def _logits(self) -> Tensor:
        network, rest = self.network, self._rest
        last = torch.tensor([total for total, _ in self._rows], device=network.device).cumsum(0) - 1
        final = torch.empty(len(self._rows), network.config.hidden_size, dtype=network.dtype, device=network.device)
        residual = None if rest.residual is None else rest.residual[last]
        network.norm(network.final_norm, Rest(rest.parts[:, last], None, residual), final, None, 1, False)
        return network.logits(final)


def prefix_lm_attention(heads: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """Attention of sequences laid one after the other, each a context that sees itself and an answer that sees all
    before it: two calls of the library's fused attention instead of a mask.

    heads    [3, tokens, heads, head_dim]: turned query, turned key, value
    rows     for each sequence its tokens and those of its context
    returns  [tokens, heads * head_dim]
    """
    mixed = torch.empty_like(heads[0])
    start = 0
    for (total, context), alike in itertools.groupby(rows):  # neighbours of one shape in one call
        count = len(list(alike))
        span = slice(start, start + count * total)
        query, key, value, result = (
            part[span].unflatten(0, (count, total)).transpose(1, 2) for part in (*heads, mixed)
        )  # [sequences, heads, tokens, head_dim]
        if context:
            first = slice(0, context)
            result[:, :, first] = sdpa_attention(query[:, :, first], key[:, :, first], value[:, :, first], None)
        if total - context == 1:
            result[:, :, context:] = sdpa_attention(query[:, :, context:], key, value, None)
        elif total > context:
            place = torch.arange(total, device=heads.device)
            is_later = place > place[context:, None]
            result[:, :, context:] = sdpa_attention(query[:, :, context:], key, value, is_later)
        start += count * total
    return mixed.flatten(1)
