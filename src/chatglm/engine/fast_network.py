"""FastNetwork: the network of a GLM as a list of kernel launches over buffers that never move.

A decode step can so be captured in a CUDA graph. Between two linears stands one kernel; what a linear leaves are the
shares of its sum, and the reader adds them, the bias and the residual. Activations are stored in the model's dtype,
sums and residual sums are fp32. The same steps run with `kernels.gpu.plain`: slow, on any device.

Source: spec of the network in model/block.py, of each step in kernels/gpu/plain.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels.gpu import FusedNorm, PackedWeight, to_streams
from ..model import GLM
from ..model.block import Block
from ..model.rotary import rotary_frequencies
from .fast_prefill import FirstPass, Rest
from .kv_cache import KVCache
from .step_buffers import StepBuffers


@dataclass(frozen=True)
class FastLinear:
    """A weight as the kernels read it, and its bias."""

    weight: PackedWeight
    bias: Tensor | None


@dataclass(frozen=True)
class FastLayer:
    """One block: its norms and its four linears."""

    input_norm: nn.LayerNorm
    qkv: FastLinear
    dense: FastLinear
    post_norm: nn.LayerNorm
    up: FastLinear
    down: FastLinear


class Unsupported(Exception):
    """The kernels have no form for this model; the message says why."""


class FastNetwork:
    """Weights of a GLM by name, and the operations that run them. Raises Unsupported."""

    def __init__(self, model: GLM, operations: ModuleType) -> None:
        config = model.config
        if config.position_encoding == "learned_2d":
            raise Unsupported("learned positions have no kernels")
        if config.mlp != "gelu_tanh":
            raise Unsupported(f"the feed-forward {config.mlp} has no kernels")
        self.operations: Any = operations
        self.config: ModelConfig = config
        self.dtype, self.device = model.dtype, model.device
        self.is_normalised = config.norm_order == "post_scaled"
        self.residual_scale = config.residual_scale if self.is_normalised else 1.0
        self.rotary_streams = 2 if config.position_encoding == "rotary_2d" else 1
        self.per_head = config.qkv_layout == "per_head"
        self.frequencies = rotary_frequencies(config.head_dim // self.rotary_streams, config.rotary_base, model.device)
        self.table = _linear("word_embeddings", model.transformer.word_embeddings).weight
        self.head = _linear("lm_head", model.lm_head)
        self.final_norm = model.transformer.final_layernorm
        self.layers = [_layer(number, block) for number, block in enumerate(model.transformer.layers)]
        self.embedding = model.transformer.word_embeddings
        self._expanded: Tensor | None = None
        normalising = [self.head.weight, *(w for layer in self.layers for w in (layer.qkv.weight, layer.up.weight))]
        self.is_fused = all(operations.fuses(weight, 1) for weight in normalising)
        self.workspace = operations.workspace([self.head.weight, *(part.weight for part in self._all_linears())])
        self.fused_norms = {
            id(norm): tuple(to_streams(part.detach(), weight.streams).contiguous() for part in (norm.weight, norm.bias))
            for norm, weight in self._norm_readers()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of weights, scales, biases and norms that one decode step reads."""
        linears = [part for layer in self.layers for part in (layer.qkv, layer.dense, layer.up, layer.down)]
        total = sum(linear.weight.num_bytes for linear in [*linears, self.head])
        total += sum(linear.bias.numel() * linear.bias.itemsize for linear in linears if linear.bias is not None)
        norms = [norm for layer in self.layers for norm in (layer.input_norm, layer.post_norm)] + [self.final_norm]
        return total + sum(2 * norm.weight.numel() * norm.weight.itemsize for norm in norms)

    # Decode

    def decode(self, step: StepBuffers, cache: KVCache, batch: int, *, overlap: bool = False) -> None:
        """One new token for the first `batch` rows of `step`; fp32 logits and the best tokens are left there."""
        operations = self.operations
        is_fused = self.is_fused and batch == 1
        first_streams = self.layers[0].qkv.weight.streams if is_fused else 1
        embedded = step.hidden[0][:batch] if is_fused else step.embedded[:batch]
        operations.embed(
            step.ids[:batch],
            self.table,
            step.lengths[:batch],
            step.position_base[:, :batch],
            step.position_step[:, :batch],
            self.frequencies,
            self.config.pre_seq_len or 0,
            embedded,
            step.cosines[:batch],
            step.sines[:batch],
            streams=first_streams,
            overlap=overlap,
        )
        logits = step.logits[None, :batch]
        if is_fused:
            for number, layer in enumerate(self.layers):
                self._decode_fused_layer(number, layer, step, cache, overlap)
            norm = self._fused_norm(self.final_norm, step.normalised[0])
            self._linear(step.hidden[0], FastLinear(self.head.weight, None), logits, norm=norm, overlap=overlap)
        else:
            rest = Rest(embedded[None])
            for number, layer in enumerate(self.layers):
                rest = self._decode_layer(number, layer, rest, step, cache, batch, overlap)
            head_input = step.normalised[0][:batch]
            self.norm(self.final_norm, rest, head_input, None, self.head.weight.streams, overlap)
            self._linear(head_input, FastLinear(self.head.weight, None), logits, overlap=overlap)
        operations.best_tokens(
            step.logits[:batch],
            step.no_piece,
            tuple(buffer[:batch] for buffer in step.chunks),
            step.ids[:batch],
            step.lengths[:batch],
            step.chosen_of(batch),
            overlap=overlap,
        )

    def _decode_fused_layer(
        self, number: int, layer: FastLayer, step: StepBuffers, cache: KVCache, overlap: bool
    ) -> None:
        """One sequence: norms and residuals are part of the linears; step.hidden[0] in and out."""
        first, second = (buffer[:1] for buffer in step.normalised)
        following = self.layers[number + 1].qkv if number + 1 < len(self.layers) else self.head
        qkv = step.wide[: layer.qkv.weight.rows].view(1, 1, -1)
        norm = self._fused_norm(layer.input_norm, first)
        self._linear(step.hidden[0], FastLinear(layer.qkv.weight, None), qkv, norm=norm, overlap=overlap)
        self._attention(number, layer, qkv, step, cache, overlap)
        post = {"residual_scale": self.residual_scale, "overlap": overlap}
        residual = (first, 1) if self.is_normalised else (step.hidden[0], layer.qkv.weight.streams)
        self._linear(
            step.mixed[:1], layer.dense, step.hidden[1][None],
            residual=residual[0], residual_streams=residual[1], out_streams=layer.up.weight.streams, **post,
        )  # fmt: skip
        norm = self._fused_norm(layer.post_norm, second)
        self._linear(
            step.hidden[1], layer.up, step.inner[None, :1],
            norm=norm, use_gelu=True, out_streams=layer.down.weight.streams, overlap=overlap,
        )  # fmt: skip
        residual = (second, 1) if self.is_normalised else (step.hidden[1], layer.up.weight.streams)
        self._linear(
            step.inner[:1], layer.down, step.hidden[0][None],
            residual=residual[0], residual_streams=residual[1], out_streams=following.weight.streams, **post,
        )  # fmt: skip

    def _fused_norm(self, norm: nn.LayerNorm, normalised: Tensor) -> FusedNorm:
        weight, bias = self.fused_norms[id(norm)]
        return FusedNorm(weight, bias, norm.eps, normalised[0])

    def _linear(self, hidden: Tensor, linear: FastLinear, out: Tensor, **options: Any) -> None:
        self.operations.linear(hidden, linear.weight, out, bias=linear.bias, workspace=self.workspace, **options)

    def _decode_layer(
        self, number: int, layer: FastLayer, rest: Rest, step: StepBuffers, cache: KVCache, batch: int, overlap: bool
    ) -> Rest:
        streams = layer.qkv.weight.streams
        first, second = (buffer[:batch] for buffer in step.normalised)
        first_kept, second_kept = (None if self.is_normalised else buffer[:batch] for buffer in step.kept)
        self.norm(layer.input_norm, rest, first, first_kept, streams, overlap)
        qkv = self._parts(step.wide, layer.qkv, batch)
        self._linear(first, FastLinear(layer.qkv.weight, None), qkv, overlap=overlap)
        self._attention(number, layer, qkv, step, cache, overlap)
        dense = self._parts(step.narrow, layer.dense, batch)
        self._linear(step.mixed[:batch], FastLinear(layer.dense.weight, None), dense, overlap=overlap)
        rest = self.rest(dense, layer.dense, first, streams, first_kept)
        self.norm(layer.post_norm, rest, second, second_kept, layer.up.weight.streams, overlap)
        inner, inner_streams = step.inner[:batch], layer.down.weight.streams
        self._linear(second, layer.up, inner[None], use_gelu=True, out_streams=inner_streams, overlap=overlap)
        down = self._parts(step.narrow, layer.down, batch)
        self._linear(inner, FastLinear(layer.down.weight, None), down, overlap=overlap)
        return self.rest(down, layer.down, second, layer.up.weight.streams, second_kept)

    def _attention(
        self, number: int, layer: FastLayer, qkv: Tensor, step: StepBuffers, cache: KVCache, overlap: bool
    ) -> None:
        batch = qkv.shape[1]
        self.operations.decode_attention(
            qkv,
            layer.qkv.bias,
            step.cosines[:batch],
            step.sines[:batch],
            cache.keys[number],
            cache.values[number],
            step.tables[:batch],
            step.lengths[:batch],
            (step.partial, step.tickets),
            step.mixed[:batch],
            rotary_streams=self.rotary_streams,
            per_head=self.per_head,
            pieces=self.operations.pieces_of(self.config.num_heads, batch),
            streams=layer.dense.weight.streams,
            overlap=overlap,
        )

    def norm(
        self, norm: nn.LayerNorm, rest: Rest, out: Tensor, kept: Tensor | None, streams: int, overlap: bool
    ) -> None:
        self.operations.norm(
            rest.parts,
            norm.weight,
            norm.bias,
            norm.eps,
            out,
            bias=rest.bias,
            residual=rest.residual,
            residual_streams=rest.residual_streams,
            residual_scale=self.residual_scale,
            kept=kept,
            streams=streams,
            overlap=overlap,
        )

    def rest(self, parts: Tensor, linear: FastLinear, normalised: Tensor, streams: int, kept: Tensor | None) -> Rest:
        """The residual is the normalised input (post_scaled) or the sum before the norm (pre)."""
        if kept is None:
            return Rest(parts, linear.bias, normalised, streams)
        return Rest(parts, linear.bias, kept)

    def _parts(self, buffer: Tensor, linear: FastLinear, batch: int) -> Tensor:
        """[splits, batch, rows] for the output of a linear, at the start of a flat buffer."""
        shape = (self.operations.splits_of(linear.weight, batch), batch, linear.weight.rows)
        return buffer[: math.prod(shape)].view(shape)

    # Prefill

    def prefill(
        self, ids: Tensor, positions: Tensor, slots: Tensor, rows: list[tuple[int, int]], cache: KVCache
    ) -> Tensor:
        """A first pass at once; see fast_prefill.FirstPass."""
        first_pass = FirstPass(self, ids, positions, slots, rows, cache)
        logits = first_pass.advance(first_pass.layers_left)
        assert logits is not None
        return logits

    def product(self, hidden: Tensor, linear: FastLinear, out: Tensor) -> None:
        """Hidden · weightᵀ + bias of many tokens, by the library; quantised weights are expanded one at a time."""
        weight = linear.weight
        if weight.scale is None:
            matrix = weight.data.to(hidden.dtype)
        else:
            if self._expanded is None:
                largest = max(part.weight.rows * part.weight.columns for part in self._all_linears())
                self._expanded = torch.empty(largest, dtype=self.dtype, device=self.device)
            matrix = self._expanded[: weight.rows * weight.columns].view(weight.rows, weight.columns)
            self.operations.dequantize(weight, matrix)
        if linear.bias is None:
            torch.mm(hidden, matrix.t(), out=out)
        else:
            torch.addmm(linear.bias.to(hidden.dtype), hidden, matrix.t(), out=out)

    def _norm_readers(self) -> list[tuple[nn.LayerNorm, PackedWeight]]:
        """Each norm, and the weight that reads what it makes."""
        pairs = [(layer.input_norm, layer.qkv.weight) for layer in self.layers]
        pairs += [(layer.post_norm, layer.up.weight) for layer in self.layers]
        return [*pairs, (self.final_norm, self.head.weight)]

    def _all_linears(self) -> list[FastLinear]:
        return [part for layer in self.layers for part in (layer.qkv, layer.dense, layer.up, layer.down)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of a few tokens in the usual order, at most 64 at a time."""
        logits = torch.empty(hidden.shape[0], self.head.weight.rows, dtype=torch.float32, device=self.device)
        for start in range(0, hidden.shape[0], 64):
            part = to_streams(hidden[start : start + 64], self.head.weight.streams).contiguous()
            self._linear(part, FastLinear(self.head.weight, None), logits[None, start : start + 64])
        return logits


def _linear(name: str, module: nn.Module) -> FastLinear:
    weight = PackedWeight.of(module)
    if weight is None:
        raise Unsupported(f"the weight of {name} has a shape or group size without kernels")
    bias = getattr(module, "bias", None)
    return FastLinear(weight, None if bias is None else bias.detach())


def _layer(number: int, block: nn.Module) -> FastLayer:
    assert isinstance(block, Block)
    where = f"layer {number}"
    return FastLayer(
        block.input_layernorm,
        _linear(where, block.attention.query_key_value),
        _linear(where, block.attention.dense),
        block.post_attention_layernorm,
        _linear(where, block.mlp.dense_h_to_4h),
        _linear(where, block.mlp.dense_4h_to_h),
    )
