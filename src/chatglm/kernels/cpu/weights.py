"""The weights of a GLM as the kernels read them: where they already lie, nothing is copied or repacked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...model import GLM
from ...model.block import Block
from ...quantization import QuantizedLinear, RowQuantizedLinear
from .formats import GROUPS, Matrix

FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Unsupported(Exception):
    """The kernels have no form for this model; the message says why."""


@dataclass(frozen=True)
class Weight:
    """One linear. `matrix` is None for floating weights; the bias is fp32, zeros where the linear has none."""

    matrix: Matrix | None
    columns: int
    rows: int
    weight: Tensor
    scale: Tensor | None
    bias: Tensor

    @property
    def dtype(self) -> str:
        return FLOATS[self.weight.dtype]

    @property
    def row_bytes(self) -> int:
        return self.weight.shape[1] * self.weight.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and bias."""
        scale = 0 if self.scale is None else self.scale.numel() * self.scale.itemsize
        return self.weight.numel() * self.weight.itemsize + scale + self.bias.numel() * 4


def weight_of(name: str, module: nn.Module) -> Weight:
    """The weight of a linear module. Raises Unsupported for a form without kernels."""
    held, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(held, Tensor) or held.device.type != "cpu" or not held.is_contiguous():
        raise Unsupported(f"{name} is no dense weight on the CPU")
    rows = held.shape[0]
    added = torch.zeros(rows) if bias is None else bias.detach().float().contiguous()
    if not isinstance(module, QuantizedLinear):
        if held.dtype not in FLOATS:
            raise Unsupported(f"{name} has the dtype {held.dtype}")
        return Weight(None, held.shape[1], rows, held.detach(), None, added)
    is_original = isinstance(module, RowQuantizedLinear)
    columns = module.in_features
    if module.group_size not in (0, *GROUPS) or columns % 8:
        raise Unsupported(f"{name} has groups of {module.group_size} in {columns} columns")
    matrix = Matrix(columns, module.bits, module.group_size, is_original and module.bits == 4)
    return Weight(matrix, columns, rows, held, module.weight_scale.contiguous(), added)


@dataclass(frozen=True)
class Norm:
    """A LayerNorm: weight and bias fp32, and the two numbers that its kernel reads (residual scale, epsilon)."""

    weight: Tensor
    bias: Tensor
    factors: Tensor


@dataclass(frozen=True)
class Layer:
    """One block: its norms and its four linears."""

    input_norm: Norm
    qkv: Weight
    dense: Weight
    post_norm: Norm
    up: Weight
    down: Weight


@dataclass(frozen=True)
class Weights:
    """All that a pass reads but the embedding, which PyTorch looks up."""

    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Weight

    @property
    def is_quantised(self) -> bool:
        """Whether the linears of the layers are."""
        return all(part.matrix for layer in self.layers for part in (layer.qkv, layer.dense, layer.up, layer.down))

    @property
    def nbytes(self) -> int:
        """Bytes that one decode step reads, the KV cache left out."""
        linears = [part for layer in self.layers for part in (layer.qkv, layer.dense, layer.up, layer.down)]
        norms = [norm for layer in self.layers for norm in (layer.input_norm, layer.post_norm)]
        return sum(part.nbytes for part in [*linears, self.head]) + sum(8 * norm.weight.numel() for norm in norms)


def weights_of(model: GLM) -> Weights:
    """The weights of a model on the CPU. Raises Unsupported where a part has no kernels."""
    config = model.config
    if config.mlp != "gelu_tanh":
        raise Unsupported(f"the feed-forward {config.mlp} has no kernels")
    scale = config.residual_scale if config.norm_order == "post_scaled" else 1.0

    def norm(module: Any) -> Norm:
        factors = torch.tensor([scale, module.eps], dtype=torch.float64)
        return Norm(module.weight.detach().float().contiguous(), module.bias.detach().float().contiguous(), factors)

    layers = []
    for number, block in enumerate(model.transformer.layers):
        assert isinstance(block, Block)
        where = f"layer {number}"
        layers.append(
            Layer(
                norm(block.input_layernorm),
                weight_of(where, block.attention.query_key_value),
                weight_of(where, block.attention.dense),
                norm(block.post_attention_layernorm),
                weight_of(where, block.mlp.dense_h_to_4h),
                weight_of(where, block.mlp.dense_4h_to_h),
            )
        )
    return Weights(tuple(layers), norm(model.transformer.final_layernorm), weight_of("lm_head", model.lm_head))
