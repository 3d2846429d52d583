"""Linear and embedding over quantised weights, in plain PyTorch: the slow twins of every faster kernel.

State names are the original's: `weight` (codes), `weight_scale` fp16, `bias`. Codes and scales are buffers: they are
not trained, and no cast of the model may touch them, since a scale rounded to bf16 would change the weights.
The two formats differ only in `expand` and `shrink`: `Row…` is the original's, `Group…` the project's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.linear import linear_by_rows
from .group_format import check_group_size, dequantize_groups, quantize_groups
from .row_format import check_bits, dequantize_rows, packed_columns, quantize_rows


class Quantized(nn.Module):
    """What all modules share: `weight` [rows, bytes], fp16 `weight_scale`, casts that leave them alone.

    bits        8 or 4
    group_size  columns that share a scale; 0 is a whole row
    """

    weight: Tensor
    weight_scale: Tensor
    bits: int
    group_size: int

    def hold(self, packed: Tensor, scale: Tensor) -> None:
        """Take codes and scales as the module's buffers."""
        self.register_buffer("weight", packed)
        self.register_buffer("weight_scale", scale)

    def expand(self, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of codes and their scales → weights [..., columns] in `dtype`."""
        raise NotImplementedError

    def shrink(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Floating weights [rows, columns] → codes and scales."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scale.dtype:  # a cast of the model; a move keeps the dtype
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole weight, [rows, columns] in `dtype`."""
        return self.expand(self.weight, self.weight_scale, dtype)

    def quantize_(self, weight: Tensor) -> None:
        """Take over a floating weight [rows, columns], quantised."""
        self.weight, self.weight_scale = self.shrink(weight)

    def _describe(self) -> str:
        return f"bits={self.bits}" + (f", group_size={self.group_size}" if self.group_size else "")


class _Rows(Quantized):
    """The original's format: a scale a row."""

    def _empty(self, rows: int, columns: int, bits: int) -> None:
        check_bits(bits)
        self.bits, self.group_size = bits, 0
        packed = torch.zeros(rows, packed_columns(columns, bits), dtype=torch.int8)
        self.hold(packed, torch.zeros(rows, dtype=torch.float16))

    def expand(self, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return dequantize_rows(packed, scale, self.bits, dtype)

    def shrink(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(weight, self.bits)


class _Groups(Quantized):
    """The project's own format: a scale a group of columns."""

    def _empty(self, rows: int, columns: int, bits: int, group_size: int) -> None:
        check_bits(bits)
        check_group_size(columns, group_size)
        self.bits, self.group_size = bits, group_size
        packed = torch.zeros(rows, packed_columns(columns, bits), dtype=torch.uint8 if bits == 4 else torch.int8)
        self.hold(packed, torch.zeros(rows, columns // group_size, dtype=torch.float16))

    def expand(self, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return dequantize_groups(packed, scale, self.bits, dtype)

    def shrink(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_groups(weight, self.bits, self.group_size)


class _DequantizedProduct(torch.autograd.Function):
    """input · weightᵀ that keeps the packed weight for the backward pass instead of its expanded copy."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, scale: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.module = module
        return functional.linear(input, module.expand(packed, scale, input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scale = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ ctx.module.expand(packed, scale, gradient.dtype), None, None, None


class QuantizedLinear(Quantized):
    """y = x · (scale · codes)ᵀ + bias, computed in the dtype of x; gradients reach x and the bias.

    Source: spec/chatglm-6b.md §6.1, §6.2.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def _shape(self, in_features: int, out_features: int, bias: bool) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self._tied_to: tuple[Quantized, ...] = ()  # in a tuple, so that it is no submodule

    def tie(self, embedding: QuantizedEmbedding) -> None:
        """Share codes and scales with an embedding, also after the model was moved."""
        self._tied_to = (embedding,)
        self._share()

    @property
    def is_tied(self) -> bool:
        """Whether codes and scales are an embedding's."""
        return bool(self._tied_to)

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
            output = product(input, self.weight, self.weight_scale, self)
            return output if self.bias is None else output + self.bias.to(output.dtype)

        def widen(start: int, stop: int) -> Tensor:
            return self.expand(self.weight[start:stop], self.weight_scale[start:stop], input.dtype)

        if input.device.type == "cpu":  # a few rows at a time stay in the cache
            return linear_by_rows(input, self.out_features, widen, self.bias)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, widen(0, self.out_features), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"


class QuantizedEmbedding(Quantized):
    """Rows of scale · codes by id; only the asked rows are expanded, never the table.

    The output dtype follows `.half()`, `.float()` and `.bfloat16()` of the model, as an ordinary embedding's does.
    """

    dtype_like: Tensor
    num_embeddings: int
    embedding_dim: int

    def _shape(self, num_embeddings: int, embedding_dim: int) -> None:
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.register_buffer("dtype_like", torch.empty(0), persistent=False)  # empty: remembers the model's dtype

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] → [..., embedding_dim]."""
        packed = functional.embedding(ids, self.weight)  # [..., bytes]
        scales = self.weight_scale if self.group_size else self.weight_scale[:, None]
        scale = functional.embedding(ids, scales)  # [..., groups or 1]
        return self.expand(packed, scale if self.group_size else scale.squeeze(-1), self.dtype_like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._describe()}"


class RowQuantizedLinear(_Rows, QuantizedLinear):
    """A linear in the original's format: `weight` int8 [out, bytes], `weight_scale` fp16 [out]."""

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = True) -> None:
        super().__init__()
        self._empty(out_features, in_features, bits)
        self._shape(in_features, out_features, bias)


class RowQuantizedEmbedding(_Rows, QuantizedEmbedding):
    """An embedding in the original's format."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int) -> None:
        super().__init__()
        self._empty(num_embeddings, embedding_dim, bits)
        self._shape(num_embeddings, embedding_dim)


class GroupQuantizedLinear(_Groups, QuantizedLinear):
    """A linear in the own format: `weight` uint8 [out, in / 2] or int8 [out, in], `weight_scale` fp16 [out, groups]."""

    def __init__(self, in_features: int, out_features: int, bits: int, group_size: int, bias: bool = True) -> None:
        super().__init__()
        self._empty(out_features, in_features, bits, group_size)
        self._shape(in_features, out_features, bias)


class GroupQuantizedEmbedding(_Groups, QuantizedEmbedding):
    """An embedding in the own format."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int, group_size: int) -> None:
        super().__init__()
        self._empty(num_embeddings, embedding_dim, bits, group_size)
        self._shape(num_embeddings, embedding_dim)
