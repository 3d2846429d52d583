"""Linear and embedding over row-quantised weights, in plain PyTorch: the slow twins of every faster kernel.

State names are the original's: `weight` int8, `weight_scale` fp16, `bias`. Weights and scales are buffers: they are not
trained, and no cast of the model may touch them, since a scale rounded to bf16 would change the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.linear import linear_by_rows
from .row_format import check_bits, dequantize_rows, packed_columns, quantize_rows


class _RowQuantized(nn.Module):
    """What both modules share: int8 `weight` [rows, bytes], fp16 `weight_scale` [rows], casts that leave them alone."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, rows: int, columns: int, bits: int) -> None:
        super().__init__()
        check_bits(bits)
        self.bits = bits
        self.register_buffer("weight", torch.zeros(rows, packed_columns(columns, bits), dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(rows, dtype=torch.float16))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scale.dtype:  # a cast of the model; a move keeps the dtype
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole weight, [rows, columns] in `dtype`."""
        return dequantize_rows(self.weight, self.weight_scale, self.bits, dtype)

    def quantize_(self, weight: Tensor) -> None:
        """Take over a floating weight [rows, columns], quantised."""
        self.weight, self.weight_scale = quantize_rows(weight, self.bits)


class _DequantizedProduct(torch.autograd.Function):
    """input · weightᵀ that keeps the packed weight for the backward pass instead of its expanded copy."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.bits = bits
        return functional.linear(input, dequantize_rows(packed, scale, bits, input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scale = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ dequantize_rows(packed, scale, ctx.bits, gradient.dtype), None, None, None


class RowQuantizedLinear(_RowQuantized):
    """y = x · (scale · codes)ᵀ + bias, computed in the dtype of x; gradients reach x and the bias.

    Source: spec/chatglm-6b.md §6.1, §6.2.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = True) -> None:
        super().__init__(out_features, in_features, bits)
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self._tied_to: tuple[_RowQuantized, ...] = ()  # in a tuple, so that it is no submodule

    def tie(self, embedding: RowQuantizedEmbedding) -> None:
        """Share codes and scales with an embedding, also after the model was moved."""
        self._tied_to = (embedding,)
        self._share()

    def _share(self) -> None:
        for source in self._tied_to:
            self.weight, self.weight_scale = source.weight, source.weight_scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._tied_to and self._tied_to[0].weight.device == self.weight.device:
            self._share()  # moving a module copies its buffers: drop the second copy
        return self

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features], dtype of the input."""
        if input.requires_grad and torch.is_grad_enabled():
            product: Callable[..., Tensor] = _DequantizedProduct.apply
            output = product(input, self.weight, self.weight_scale, self.bits)
            return output if self.bias is None else output + self.bias.to(output.dtype)

        def widen(start: int, stop: int) -> Tensor:
            return dequantize_rows(self.weight[start:stop], self.weight_scale[start:stop], self.bits, input.dtype)

        if input.device.type == "cpu":  # a few rows at a time stay in the cache
            return linear_by_rows(input, self.out_features, widen, self.bias)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, widen(0, self.out_features), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class RowQuantizedEmbedding(_RowQuantized):
    """Rows of scale · codes by id; only the asked rows are expanded, never the table.

    The output dtype follows `.half()`, `.float()` and `.bfloat16()` of the model, as an ordinary embedding's does.
    """

    dtype_like: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int) -> None:
        super().__init__(num_embeddings, embedding_dim, bits)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.register_buffer("dtype_like", torch.empty(0), persistent=False)  # empty: remembers the model's dtype

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] → [..., embedding_dim]."""
        packed = functional.embedding(ids, self.weight)  # [..., bytes]
        scale = functional.embedding(ids, self.weight_scale[:, None]).squeeze(-1)  # [...]
        return dequantize_rows(packed, scale, self.bits, self.dtype_like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"
