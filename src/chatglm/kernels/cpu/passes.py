"""Programs for a pass over some tokens: which kernels run, over which buffers, in which order."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from ...config import ModelConfig
from .attention import Heads
from .formats import Layout, Tile
from .kit import Kit
from .weights import FLOATS, Layer, Norm, Weight
from .workers import Operation

MOST_FEW = 4
"""Up to this many tokens the weights are read in stored order (few_tokens); more go through panels (many_tokens)."""

CHUNK_BYTES = 1 << 19
"""Weights in one chunk of a linear over few tokens."""

SEGMENT = 2048
"""Columns of a token that are rounded in one chunk."""


def padded(tokens: int) -> int:
    """Tokens for which there is a kernel: 1, 2, 4, or any number of more."""
    return tokens if tokens > MOST_FEW or tokens < 3 else 4


class Pass:
    """Emits the operations of a pass over `tokens` tokens, and owns the buffers between them (all fp32).

    Activations that were rounded lie in buffers shared by all layers: an operation reads them before the next writes.
    """

    def __init__(self, kit: Kit, config: ModelConfig, heads: Heads, tokens: int) -> None:
        self.kit, self.config, self.heads, self.tokens = kit, config, heads, tokens
        self.is_normalised = config.norm_order == "post_scaled"
        self._rounded: dict[Layout | Tile, tuple[Tensor, ...]] = {}
        self.operations: list[Operation] = []
        self.kept: list[object] = []

    def new(self, *shape: int) -> Tensor:
        """A buffer of zeros with room for padding tokens."""
        return torch.zeros(padded(shape[0]), *shape[1:])

    def _add(self, kernel: int, chunks: int, *fields: Tensor | int | None) -> None:
        words = [field.data_ptr() if isinstance(field, Tensor) else field or 0 for field in fields]
        self.kept += [field for field in fields if isinstance(field, Tensor)]
        self.operations.append(Operation(kernel, numpy.array(words, dtype=numpy.int64), chunks))

    def norm(
        self, norm: Norm, branch: Tensor, residual: Tensor | None, out: Tensor, kept: Tensor, then: Weight
    ) -> None:
        """LayerNorm(branch + scale · residual) into `out`, rounded for the linear `then` where that is one step.

        kept  receives the sum itself in a pre-LN model
        """
        tokens, columns = branch.shape[0], branch.shape[1]
        layout = self._layout(then) if self._is_few(tokens) else None
        keeps = not self.is_normalised
        kernel = self.kit.norm(columns, residual is not None, keeps, layout)
        rounded = self._buffers(layout, tokens) if layout else (None, None, None)
        self._add(kernel, self._real(tokens), branch, residual, norm.weight, norm.bias, out, kept if keeps else None,
                  norm.factors, *rounded)  # fmt: skip

    def linear(
        self, weight: Weight, source: Tensor, out: Tensor, *, is_rounded: bool = False, has_gelu: bool = False
    ) -> None:
        """Source · weightᵀ + bias into `out`.

        is_rounded  a norm rounded the source already, where it is few tokens
        has_gelu    the source goes through GELU first (quantised weights only)
        """
        tokens = source.shape[0]
        if weight.matrix is None:
            assert not has_gelu
            kernel = self.kit.linear_floats(weight.columns, weight.dtype)
            rows, chunks = self._rows_a_chunk(weight)
            self._add(kernel, chunks, weight.weight, weight.bias, source, out, weight.rows, rows, self._real(tokens))
        elif self._is_few(tokens):
            layout = Layout.of(self.kit.target, weight.matrix)
            rounded = self._buffers(layout, tokens)
            if not is_rounded:
                segments = _segments(layout)
                kernel = self.kit.quantize_tokens(layout, segments, has_gelu)
                self._add(kernel, self._real(tokens) * segments, source, *rounded)
            rows, chunks = self._rows_a_chunk(weight)
            kernel = self.kit.linear_few(weight.matrix, tokens)
            self._add(kernel, chunks, weight.weight, weight.scale, weight.bias, *rounded, out, weight.rows, rows)
        else:
            tile = Tile.of(self.kit.target, weight.matrix)
            rounded = self._buffers(tile, tokens)
            self._add(self.kit.quantize_tiles(tile, has_gelu), -(-tokens // tile.tokens), source, *rounded, tokens)
            kernel, chunks = self.kit.linear_many(weight.matrix), -(-weight.rows // tile.rows)
            self._add(kernel, chunks, weight.weight, weight.scale, weight.bias, *rounded, out, weight.rows, tokens)

    def feed_forward(self, layer: Layer, source: Tensor, inner: Tensor, out: Tensor) -> None:
        """Down(GELU(up(source))) into `out`; a norm has rounded the source where it is few tokens."""
        self.linear(layer.up, source, inner, is_rounded=True)
        if layer.down.matrix is None:
            segments = max(1, inner.shape[1] // SEGMENT) if inner.shape[1] % SEGMENT == 0 else 1
            self._add(self.kit.gelu(inner.shape[1] // segments), self._real(inner.shape[0]) * segments, inner)
        self.linear(layer.down, inner, out, has_gelu=layer.down.matrix is not None)

    def attend_one(
        self,
        qkv: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        tables: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
    ) -> None:
        """Attention of one new token a sequence, which may look at other new ones.

        tables  int32: slots [sequences, slots a row], lengths [sequences], the new tokens' slots [sequences]
        """
        slots, lengths, newest = tables
        places = self.tokens == 1
        if not places:
            self.place_keys(qkv, angles, cache, newest)
        kernel = self.kit.attend_one(self.heads, places)
        self._add(kernel, self.tokens * self.heads.heads, qkv, *angles, *cache, slots, slots.shape[1], lengths, out)

    def place_keys(
        self, qkv: Tensor, angles: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], slots: Tensor
    ) -> None:
        """Turn queries and keys in place, and fill the cache; slots int32 [tokens]."""
        self._add(self.kit.place_keys(self.heads), self.tokens, qkv, *angles, *cache, slots, 0, None, None)

    def _is_few(self, tokens: int) -> bool:
        return tokens <= MOST_FEW

    def _real(self, tokens: int) -> int:
        """Tokens without padding: buffers may have some more rows."""
        return min(tokens, self.tokens)

    def _layout(self, weight: Weight) -> Layout | None:
        return None if weight.matrix is None else Layout.of(self.kit.target, weight.matrix)

    def _rows_a_chunk(self, weight: Weight) -> tuple[int, int]:
        rows = max(8, CHUNK_BYTES // weight.row_bytes)
        return rows, -(-weight.rows // rows)

    def _buffers(self, form: Layout | Tile, tokens: int) -> tuple[Tensor, ...]:
        """Codes, scales and corrections, or codes, starts and scales."""
        held = self._rounded.get(form)
        if held is None or held[0].shape[0] < tokens:
            if isinstance(form, Layout):
                held = (
                    torch.zeros(tokens, form.padded_columns, dtype=torch.int8),
                    torch.zeros(tokens, form.groups),
                    torch.zeros(tokens, form.groups),
                )
            else:
                room = -(-tokens // form.tokens) * form.tokens
                held = (
                    torch.empty(room, form.padded_columns, dtype=torch.int8),
                    torch.empty(room, form.groups, dtype=torch.int32),
                    torch.empty(room, form.groups),
                )
            self._rounded[form] = held
            self.kept.append(held)
        return held


def _segments(layout: Layout) -> int:
    """Into how many chunks the rounding of one token is cut: equal ones of whole steps."""
    steps = -(-layout.columns // layout.step)
    wanted = max(1, layout.columns // SEGMENT)
    return wanted if layout.columns % layout.step == 0 and steps % wanted == 0 else 1


def cache_dtype(cache: Tensor) -> str:
    """The dtype of a KV cache by name."""
    return FLOATS[cache.dtype]
