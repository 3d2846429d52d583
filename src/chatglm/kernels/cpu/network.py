"""CpuNetwork: whole passes of a GLM in native code, over a KV cache.

A decode step is one program from the first norm to the logits. A prefill is a program cut at attention, which PyTorch's
fused kernel computes; contexts lie one after the other without padding, so no mask is needed. The slow twin is
model/glm.py itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...model import GLM
from ...model.rotary import rotary_table
from .attention import Heads
from .kit import Kit
from .passes import Pass, cache_dtype
from .weights import Unsupported, weights_of
from .workers import Program, Workers

PREFILL_BLOCK = 1_024
"""Tokens whose feed-forward is computed at once; bounds the memory of its inner activations."""


class CpuNetwork:
    """Runs `model` over the KV cache `keys`, `values` [layers, slots, heads, head_dim] of any floating dtype.

    Raises Unsupported where a part of the model has no kernels.
    """

    def __init__(self, model: GLM, keys: Tensor, values: Tensor, kit: Kit, workers: Workers) -> None:
        config = model.config
        streams = {"rotary_2d": 2, "rotary_1d": 1, "learned_2d": 0}[config.position_encoding]
        if config.head_dim % (8 * max(1, streams)):
            raise Unsupported(f"heads of {config.head_dim} have no kernels")
        self.model, self.config, self.kit, self.workers = model, config, kit, workers
        self.keys, self.values = keys, values
        self.weights = weights_of(model)
        per_head = config.qkv_layout == "per_head"
        self.heads = Heads(config.num_heads, config.head_dim, streams, per_head, cache_dtype(keys))
        self._steps: dict[int, _Step] = {}

    @property
    def can_prefill(self) -> bool:
        """Whether first passes run here too: of quantised weights, with instructions for sums of products."""
        return self.weights.is_quantised and self.kit.target.dot != "plain"

    @torch.inference_mode()
    def decode(self, ids: Tensor, positions: Tensor, tables: Sequence[Sequence[int]]) -> Tensor:
        """One new token a sequence; fp32 logits [sequences, vocab], overwritten by the next call.

        ids        int64 [sequences]
        positions  int64 [sequences, 2, 1], or [sequences, 1] for rotary_1d
        tables     the slots of each sequence, the new token's last; a sequence may look at slots that another fills now
        """
        batch = len(tables)
        if batch not in self._steps:
            self._steps[batch] = _Step(self, batch)
        step = self._steps[batch]
        step.hidden[:batch] = self._embed(ids[:, None], positions)[:, 0]
        self._set_angles(step.angles, positions, batch)
        longest = max(map(len, tables))
        padded = [[*table, *([0] * (longest - len(table)))] for table in tables]  # one tensor, not one a row
        step.slots[:batch, :longest] = torch.tensor(padded, dtype=torch.int32)
        step.lengths[:] = torch.tensor([len(table) for table in tables], dtype=torch.int32)
        step.newest[:] = torch.tensor([table[-1] for table in tables], dtype=torch.int32)
        self.workers.run(step.program)
        return step.logits[:batch]

    @torch.inference_mode()
    def prefill(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        rows: Sequence[tuple[int, int]],
        prefix: Tensor | None = None,
    ) -> Tensor:
        """First pass over sequences laid one after the other; fp32 logits [sequences, vocab] of each one's last token.

        ids        int64 [tokens]
        positions  int64 [1, 2, tokens], or [1, tokens] for rotary_1d
        slots      int32 [tokens]: where keys and values go
        rows       for each sequence its tokens in all, and those of its context, which see each other
        prefix     int32 [sequences, prefix]: where the keys and values of a learned prefix go
        """
        logits = self.begin(ids, positions, slots, rows, prefix).advance(self.config.num_layers)
        assert logits is not None
        return logits

    @torch.inference_mode()
    def begin(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        rows: Sequence[tuple[int, int]],
        prefix: Tensor | None = None,
    ) -> FirstPass:
        """A first pass that runs as `advance` is called; arguments as for `prefill`."""
        return FirstPass(self, ids, positions, slots, rows, self._place_prefixes(prefix))

    def _place_prefixes(self, slots: Tensor | None) -> list[tuple[Tensor, Tensor] | None]:
        """Keys and values of a P-tuning prefix into the cache; for each layer both, [heads, prefix, head_dim]."""
        if slots is None:
            return [None] * self.config.num_layers
        prefixes: list[tuple[Tensor, Tensor] | None] = []
        for number, (key, value) in enumerate(self.model.transformer.prefix_encoder.key_values(1, torch.float32)):
            for cache, part in ((self.keys[number], key), (self.values[number], value)):
                cache[slots.long()] = part[0].transpose(0, 1).to(cache.dtype)  # the same for every sequence
            prefixes.append((key[0], value[0]))
        return prefixes

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        transformer = self.model.transformer
        hidden: Tensor = transformer.word_embeddings(ids).float()
        if self.config.position_encoding == "learned_2d":
            hidden = hidden + transformer.position_embeddings(positions[:, 0])
            hidden = hidden + transformer.block_position_embeddings(positions[:, 1])
        return hidden

    def _set_angles(self, angles: tuple[Tensor, Tensor], positions: Tensor, tokens: int) -> None:
        if self.heads.streams:
            rotary = rotary_table(positions, self.config)
            angles[0][:tokens] = rotary.cos.reshape(tokens, -1)
            angles[1][:tokens] = rotary.sin.reshape(tokens, -1)

    def _angles(self, tokens: int) -> tuple[Tensor, Tensor]:
        width = self.config.head_dim // 2
        return torch.zeros(tokens, width), torch.zeros(tokens, width)


class _Step:
    """Buffers and program of a decode step for one batch size."""

    def __init__(self, network: CpuNetwork, batch: int) -> None:
        config, weights = network.config, network.weights
        pass_ = Pass(network.kit, config, network.heads, batch)
        hidden_size = config.hidden_size
        self.hidden = pass_.new(batch, hidden_size)
        self.angles = network._angles(batch)
        self.slots = torch.zeros(batch, network.keys.shape[1], dtype=torch.int32)
        self.lengths, self.newest = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
        self.logits = pass_.new(batch, weights.head.rows)
        first, second, branch, mixed = (pass_.new(batch, hidden_size) for _ in range(4))
        qkv, inner = pass_.new(batch, 3 * hidden_size), pass_.new(batch, config.inner_hidden_size)
        source, residual = self.hidden, None
        sums = pass_.new(batch, hidden_size)
        for number, layer in enumerate(weights.layers):
            pass_.norm(layer.input_norm, source, residual, first, sums, layer.qkv)
            pass_.linear(layer.qkv, first, qkv, is_rounded=True)
            cache = network.keys[number], network.values[number]
            pass_.attend_one(qkv, self.angles, cache, (self.slots, self.lengths, self.newest), mixed)
            pass_.linear(layer.dense, mixed, branch)
            pass_.norm(layer.post_norm, branch, first if pass_.is_normalised else sums, second, sums, layer.up)
            pass_.feed_forward(layer, second, inner, branch)
            source, residual = branch, second if pass_.is_normalised else sums
        pass_.norm(weights.final_norm, source, residual, first, sums, weights.head)
        pass_.linear(weights.head, first, self.logits, is_rounded=True)
        self.program = Program(pass_.operations, pass_)


class FirstPass:
    """A first pass under way, which can be paused between layers.

    layers_left  of which attention is not computed yet
    """

    def __init__(
        self,
        network: CpuNetwork,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        rows: Sequence[tuple[int, int]],
        prefixes: list[tuple[Tensor, Tensor] | None],
    ) -> None:
        self._network, self._rows, self._prefixes = network, rows, prefixes
        self._pass = _Prefill(network, slots, [total for total, _ in rows])
        self._pass.hidden[: len(ids)] = network._embed(ids[None], positions)[0]
        network._set_angles(self._pass.angles, positions, len(ids))
        self._program = Program(self._pass.operations, self._pass)
        self._layer = self._done = 0

    @property
    def tokens(self) -> int:
        return self._pass.tokens

    @property
    def layers_left(self) -> int:
        return len(self._pass.stops) - self._layer

    @torch.inference_mode()
    def advance(self, layers: int) -> Tensor | None:
        """Run so many layers more; after the last one fp32 logits [sequences, vocab], until then None."""
        pass_, network = self._pass, self._network
        for _ in range(min(layers, self.layers_left)):
            stop = pass_.stops[self._layer]
            network.workers.run(self._program, self._done, stop)
            mixed = prefix_lm_attention(pass_.split_heads(), self._rows, pass_.mixed, self._prefixes[self._layer])
            self._done = stop
            self._layer += 1
        if self.layers_left:
            return None
        count = len(self._rows)
        pass_.last_mixed[:count] = mixed[pass_.last]
        pass_.last_residual[:count] = pass_.residual[pass_.last]
        network.workers.run(self._program, self._done, self._program.count)
        return pass_.logits[:count]


class _Prefill:
    """Buffers and operations of one first pass; `stops` are the places where attention is computed outside."""

    def __init__(self, network: CpuNetwork, slots: Tensor, lengths: list[int]) -> None:
        config, weights, tokens = network.config, network.weights, sum(lengths)
        self.heads, self.tokens = network.heads, tokens
        self.last = torch.tensor(lengths).cumsum(0) - 1
        pass_ = Pass(network.kit, config, network.heads, tokens)
        size = config.hidden_size
        self.hidden, self.mixed = pass_.new(tokens, size), pass_.new(tokens, size)
        self.angles = network._angles(tokens)
        self.qkv = pass_.new(tokens, 3 * size)
        first, second, branch = (pass_.new(tokens, size) for _ in range(3))
        sums = first if pass_.is_normalised else pass_.new(tokens, size)
        inner = pass_.new(min(tokens, PREFILL_BLOCK), config.inner_hidden_size)
        self.residual = sums
        self.stops: list[int] = []
        source, residual = self.hidden, None
        for number, layer in enumerate(weights.layers):
            pass_.norm(layer.input_norm, source, residual, first, sums, layer.qkv)
            pass_.linear(layer.qkv, first, self.qkv, is_rounded=True)
            pass_.place_keys(self.qkv, self.angles, (network.keys[number], network.values[number]), slots)
            self.stops.append(len(pass_.operations))
            if number < config.num_layers - 1:
                pass_.linear(layer.dense, self.mixed, branch)
                pass_.norm(layer.post_norm, branch, sums, second, sums, layer.up)
                for start in range(0, branch.shape[0], PREFILL_BLOCK):
                    part = slice(start, start + PREFILL_BLOCK)
                    rows = branch[part].shape[0]
                    pass_.feed_forward(layer, second[part], inner[:rows], branch[part])
                source, residual = branch, second if pass_.is_normalised else sums
        self._finish(pass_, network, len(lengths))
        self.operations, self.kept = pass_.operations, pass_.kept

    def _finish(self, pass_: Pass, network: CpuNetwork, sequences: int) -> None:
        """What comes after the last attention, for the last token of each sequence alone."""
        weights, size = network.weights, network.config.hidden_size
        layer = weights.layers[-1]
        pass_.tokens = sequences
        self.last_mixed, self.last_residual = pass_.new(sequences, size), pass_.new(sequences, size)
        branch, normalised, sums = (pass_.new(sequences, size) for _ in range(3))
        inner = pass_.new(sequences, network.config.inner_hidden_size)
        self.logits = pass_.new(sequences, weights.head.rows)
        pass_.linear(layer.dense, self.last_mixed, branch)
        pass_.norm(layer.post_norm, branch, self.last_residual, normalised, sums, layer.up)
        pass_.feed_forward(layer, normalised, inner, branch)
        pass_.norm(
            weights.final_norm, branch, normalised if pass_.is_normalised else sums, normalised, sums, weights.head
        )
        pass_.linear(weights.head, normalised, self.logits, is_rounded=True)

    def split_heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Turned query, turned key and value, views [tokens, heads, head_dim]."""
        qkv = self.qkv[: self.tokens]
        if self.heads.per_head:
            query, key, value = qkv.unflatten(-1, (self.heads.heads, 3, -1)).unbind(2)
        else:
            query, key, value = qkv.unflatten(-1, (3, self.heads.heads, -1)).unbind(1)
        return query, key, value


def prefix_lm_attention(
    heads: tuple[Tensor, Tensor, Tensor],
    rows: Sequence[tuple[int, int]],
    mixed: Tensor,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of sequences laid one after the other, each a context that sees itself and an answer that sees all
    before it, into `mixed` [tokens, hidden], which is returned.

    heads   query, key, value, each [tokens, heads, head_dim]
    rows    for each sequence its tokens and those of its context
    prefix  keys and values in front that every token sees, each [heads, prefix, head_dim]
    """
    attend: Any = functional.scaled_dot_product_attention
    start = 0
    for total, context in rows:
        query, key, value = (part[start : start + total].transpose(0, 1)[None] for part in heads)
        result = mixed[start : start + total].unflatten(-1, (query.shape[1], -1)).transpose(0, 1)[None]
        front = 0
        if prefix is not None:
            key, value = (torch.cat((held[None], part), dim=2) for held, part in zip(prefix, (key, value), strict=True))
            front = prefix[0].shape[1]
        seen = front + context
        if context:
            result[:, :, :context] = attend(query[:, :, :context], key[:, :, :seen], value[:, :, :seen])
        if total - context == 1:
            result[:, :, context:] = attend(query[:, :, context:], key, value)
        elif total > context:
            place = torch.arange(front + total)
            result[:, :, context:] = attend(query[:, :, context:], key, value, attn_mask=place <= place[seen:, None])
        start += total
    return mixed
