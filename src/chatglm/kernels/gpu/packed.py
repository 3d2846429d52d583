"""PackedWeight: what a kernel needs to know of a linear's or an embedding's weight, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...quantization import QuantizedEmbedding, QuantizedLinear, dequantize_groups, dequantize_rows


@dataclass(frozen=True)
class FusedNorm:
    """A LayerNorm on the input of a linear: weight and bias [columns] in the order of that input.

    normalised  [columns] in the usual order: receives what the norm made, for the residual
    """

    weight: Tensor
    bias: Tensor
    epsilon: float
    normalised: Tensor


@dataclass(frozen=True)
class PackedWeight:
    """A view of a module's weight; nothing is copied.

    data         [rows, columns] floats, or int32 words [rows, columns * bits / 32]
    scale        fp16 [rows, columns / group], or None for floats
    bits         16 for floats of any dtype, 8 or 4
    group        columns that share a scale; `columns` for row-wise formats
    is_original  INT4 codes are two's complement, the even column in the high half (the original's row-wise form)
    """

    data: Tensor
    scale: Tensor | None
    rows: int
    columns: int
    bits: int
    group: int
    is_original: bool

    @property
    def streams(self) -> int:
        """Codes in a word: the stream order that the input must have."""
        return 1 if self.bits == 16 else 32 // self.bits

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        scale = 0 if self.scale is None else self.scale.numel() * self.scale.itemsize
        return self.data.numel() * self.data.itemsize + scale

    @classmethod
    def of(cls, module: nn.Module) -> PackedWeight | None:
        """The weight of a linear or an embedding, or None where the kernels cannot read its shape."""
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            rows, columns = module.weight.shape[0], module.weight.shape[1] * 8 // module.bits
            group = module.group_size or columns
            streams = 32 // module.bits
            per_group = group // streams
            is_power = per_group & (per_group - 1) == 0
            if columns % streams or group % streams or (group < columns and not is_power):
                return None
            words = module.weight.contiguous().view(torch.int32)
            scale = module.weight_scale.reshape(rows, -1)
            return cls(words, scale, rows, columns, module.bits, group, module.group_size == 0)
        weight = module.weight
        assert isinstance(weight, Tensor)
        rows, columns = weight.shape
        return cls(weight.detach().contiguous(), None, rows, columns, 16, columns, False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All weights, [rows, columns] in `dtype`."""
        if self.scale is None:
            return self.data.to(dtype)
        if self.is_original:
            return dequantize_rows(self.data.view(torch.int8), self.scale[:, 0], self.bits, dtype)
        packed = self.data.view(torch.uint8 if self.bits == 4 else torch.int8)
        return dequantize_groups(packed, self.scale, self.bits, dtype)
