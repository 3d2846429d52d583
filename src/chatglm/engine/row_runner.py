"""RowRunner: passes whose result for a sequence does not depend on its neighbours, to the last bit, in fp32 on a CPU.

Two rules make it so. Matrix products have at least four rows: with fewer the library sums in another order, with four
or more a row's sum is always the same. Attention runs for each sequence over its own keys, without padding; a
generated token attends in a call of its own, in a decode step and in a resumed pass alike. A first pass can be paused
between layers: of other tokens, a layer's attention needs nothing but their keys and values in that layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import sdpa_attention
from ..model.positions import generation_positions
from ..model.rotary import Rotary, rotary_table
from .kv_cache import KVCache
from .runner import Runner
from .sequence import Sequence

MIN_ROWS = 4
"""Rows of the smallest matrix product."""


class RowRunner(Runner):
    """The plain Runner's contract, sequence by sequence where it matters. Rotary models without a tuned prefix."""

    def begin(self, sequences: list[Sequence]) -> PackedPrefill:
        """A first pass over these sequences, to be run with `advance`; slots must be allocated."""
        return PackedPrefill(self, sequences)

    def prefill(self, sequences: list[Sequence]) -> Tensor:
        """First pass, at once."""
        pending = self.begin(sequences)
        logits = pending.advance(pending.work_left)
        assert logits is not None
        return logits

    @torch.inference_mode()
    def step(self, tokens: Tensor, tables: list[list[int]], owners: list[Sequence]) -> Tensor:
        """One new token a row; see Runner.step."""
        device, count = self.model.device, len(tables)
        padding = [0] * max(0, MIN_ROWS - count)
        ids = torch.cat((tokens, tokens.new_tensor(padding)))
        write = torch.tensor([table[-1] for table in tables] + padding, device=device)
        reads = [torch.tensor(table, device=device) for table in tables]
        index = torch.tensor([len(table) - 1 for table in tables], device=device)
        positions = self._positions_at(self._layout(owners, [0] * count), index)
        positions = torch.cat((positions, positions.new_zeros(len(padding), *positions.shape[1:])))
        view = RowView(self.cache, write, reads)
        hidden = self.model.transformer(ids[:, None], positions, None, view, attend=view.attend)
        logits: Tensor = self.model.logits(hidden[:, -1])[:count]
        return logits

    @torch.inference_mode()
    def hidden(self, sequence: Sequence) -> Tensor:
        """Hidden states after the final norm of a context alone, [tokens, hidden]; nothing is kept in the cache."""
        pending = PackedPrefill(self, [sequence], keep=False)
        pending.advance(pending.work_left)
        return pending.hidden[0, : len(sequence.context_ids)]

    def packed_positions(self, sequences: list[Sequence], lengths: list[int]) -> Tensor:
        """Positions of sequences laid one after the other, [1, (2,) tokens]."""
        layout = self._layout(sequences, [0] * len(sequences))
        padded = generation_positions(layout, max(lengths), self.model.config)  # [sequences, (2,) longest]
        return torch.cat([padded[i, ..., :length] for i, length in enumerate(lengths)], dim=-1)[None]


@dataclass
class RowView:
    """The cache in a decode step: row r writes one slot and looks at `reads[r]`.

    write  int64 [rows]; rows beyond `reads` are padding and write to slot 0
    """

    cache: KVCache
    write: Tensor
    reads: list[Tensor]
    length: int = 1

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [rows, heads, 1, head_dim]; return the layer's whole pools, which `attend` reads."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # [slots, heads, head_dim]
        keys[self.write] = key[:, :, 0].to(keys.dtype)
        values[self.write] = value[:, :, 0].to(values.dtype)
        return keys, values

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, blocked: Tensor | None) -> Tensor:
        """Each row over its own slots, [rows, heads, 1, head_dim]; padding rows give zeros."""
        mixed = torch.zeros_like(query)
        for row, slots in enumerate(self.reads):
            key = keys[slots].transpose(0, 1)[None].to(query.dtype)  # [1, heads, length, head_dim]
            value = values[slots].transpose(0, 1)[None].to(query.dtype)
            mixed[row] = sdpa_attention(query[row : row + 1], key, value, None)[0]
        return mixed


@dataclass
class PackedView:
    """The cache in a first pass over sequences laid one after the other.

    write     int64 [tokens], padding to slot 0; None keeps nothing
    segments  (start, context tokens, all tokens) of each sequence
    """

    cache: KVCache
    write: Tensor | None
    segments: list[tuple[int, int, int]]
    length: int = 0

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [1, heads, tokens, head_dim]; return the same as the cache holds it."""
        if self.write is not None:
            self.cache.keys[layer, self.write] = key[0].transpose(0, 1).to(self.cache.keys.dtype)
            self.cache.values[layer, self.write] = value[0].transpose(0, 1).to(self.cache.values.dtype)
        return key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None) -> Tensor:
        """The context sees itself; each later token, in a call of its own, what stands before it and itself."""
        mixed = torch.zeros_like(query)
        for start, context, length in self.segments:
            spans = [(start, start + context)] + [(start + i, start + i + 1) for i in range(context, length)]
            for first, last in spans:
                seen = slice(start, last)
                mixed[:, :, first:last] = sdpa_attention(
                    query[:, :, first:last], key[:, :, seen].contiguous(), value[:, :, seen].contiguous(), None
                )
        return mixed


class PackedPrefill:
    """A first pass over several sequences that can be paused between layers.

    work_left  tokens times layers that are still to be run
    """

    def __init__(self, runner: RowRunner, sequences: list[Sequence], *, keep: bool = True) -> None:
        device = runner.model.device
        contents = [[*s.context_ids, s.start_id, *s.generated_ids] for s in sequences]
        lengths = [len(content) for content in contents]
        self._runner, self._sequences, self._lengths = runner, sequences, lengths
        starts = [sum(lengths[:number]) for number in range(len(lengths))]
        self._ends = torch.tensor([start + length - 1 for start, length in zip(starts, lengths, strict=True)])
        padding = [0] * max(0, MIN_ROWS - sum(lengths))
        ids = torch.tensor([[token for content in contents for token in content] + padding], device=device)
        slots = [slot for s, length in zip(sequences, lengths, strict=True) for slot in s.slots[:length]]
        write = torch.tensor(slots + padding, device=device) if keep else None
        segments = [
            (start, len(s.context_ids), length) for s, start, length in zip(sequences, starts, lengths, strict=True)
        ]
        self._view = PackedView(runner.cache, write, segments)
        positions = torch.nn.functional.pad(runner.packed_positions(sequences, lengths), (0, len(padding)))
        self._rotary: Rotary = rotary_table(positions, runner.model.config)
        with torch.inference_mode():
            self.hidden: Tensor = runner.model.transformer.word_embeddings(ids).to(runner.model.dtype)
        self._layer = 0

    @property
    def work_left(self) -> int:
        return int(self.hidden.shape[1]) * (len(self._runner.model.transformer.layers) - self._layer)

    @torch.inference_mode()
    def advance(self, budget: int) -> Tensor | None:
        """Run layers worth about `budget` (tokens times layers), at least one.

        Returns fp32 logits [sequences, vocab] of each one's last token once all layers have run.
        """
        layers = self._runner.model.transformer.layers
        count = max(1, budget // self.hidden.shape[1])
        for layer in layers[self._layer : self._layer + count]:
            self.hidden = layer(self.hidden, self._rotary, None, self._view, None, self._view.attend)
        self._layer = min(self._layer + count, len(layers))
        if self._layer < len(layers):
            return None
        model = self._runner.model
        self.hidden = model.transformer.final_layernorm(self.hidden)
        for sequence, length in zip(self._sequences, self._lengths, strict=True):
            sequence.cached = length
        last = self.hidden[0, self._ends.to(model.device)]  # [sequences, hidden]
        last = torch.cat((last, last[-1:].expand(max(0, MIN_ROWS - len(last)), -1)))
        return model.logits(last)[: len(self._sequences)]
