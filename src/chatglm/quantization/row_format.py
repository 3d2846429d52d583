"""The original's INT8 and INT4: one fp16 scale a row, two INT4 codes a byte. Pure functions.

A row of weights w becomes scale = fp16(max|w| / limit) and codes = round-half-even(w / scale), limit 127 or 7, both
divisions in the dtype of the weight (bf16, which the original never had, in fp32). INT4 packs along the input: the even
column in the high half of the byte, the odd one in the low half, both two's complement. Source: the released
checkpoints; spec/chatglm-6b.md §6.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import QuantizationError

LIMITS = {8: 127, 4: 7}
"""Bits → largest code. The codes are symmetric: -128 and -8 are read, never written."""

CHUNK_ELEMENTS = 1 << 22
"""Weights quantised at once; keeps temporary memory small."""

SMALLEST_SCALE_STEP = 2.0**-24
"""The distance between neighbouring subnormal fp16 numbers."""


def check_bits(bits: int) -> None:
    """Raises QuantizationError unless `bits` is 8 or 4."""
    if bits not in LIMITS:
        raise QuantizationError(f"{bits} bits is not a format of the row-wise kind", cure="use 8 or 4")


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of one packed row. Raises QuantizationError for an odd number of columns in INT4."""
    check_bits(bits)
    if bits == 8:
        return columns
    if columns % 2:
        raise QuantizationError(
            f"INT4 packs two columns into a byte; this weight has {columns} columns, an odd number", cure="use INT8"
        )
    return columns // 2


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes a byte. codes: int8 [rows, columns], each -8 … 7 → int8 [rows, columns / 2]."""
    packed_columns(codes.shape[-1], 4)
    high, low = codes[..., 0::2], codes[..., 1::2]
    return (high << 4) | (low & 15)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of pack_int4. int8 [..., columns / 2] → int8 [..., columns], any of the 256 bytes."""
    high = packed >> 4  # arithmetic: the sign stays
    low = (packed << 4) >> 4
    return torch.stack((high, low), dim=-1).flatten(-2)


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix: (int8 [rows, columns] or [rows, columns / 2], fp16 [rows]).

    Bit for bit what the original writes, with two exceptions where the original writes garbage: a row of zeros has
    scale 0 and codes 0 (there 0/0), and a row so small that its subnormal fp16 scale was rounded down too far gets the
    next scale up (there a code overflows its bits). Raises QuantizationError for a value that is not finite, a row too
    large for an fp16 scale, and odd columns in INT4.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise QuantizationError(f"only a floating matrix can be quantised, not {weight.dtype} {list(weight.shape)}")
    rows, columns = weight.shape
    packed = weight.new_empty((rows, packed_columns(columns, bits)), dtype=torch.int8)
    scales = weight.new_empty(rows, dtype=torch.float16)
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, 0 if weight.is_meta else rows, step):
        codes, scale = _quantize_some_rows(weight[start : start + step], bits, start)
        packed[start : start + step] = pack_int4(codes) if bits == 4 else codes
        scales[start : start + step] = scale
    return packed, scales


def _quantize_some_rows(weight: Tensor, bits: int, first_row: int) -> tuple[Tensor, Tensor]:
    """int8 codes [rows, columns], not packed, and scales."""
    limit = LIMITS[bits]
    if weight.dtype == torch.bfloat16:  # its quotients would round to 128
        weight = weight.float()
    low, high = torch.aminmax(weight, dim=1)
    largest = torch.maximum(-low, high)  # [rows], in the weight's dtype; a NaN stays
    scale = (largest / limit).half()  # [rows]
    if not bool(torch.isfinite(scale).all()):
        row = int((~torch.isfinite(scale)).nonzero()[0])
        raise QuantizationError(
            f"row {first_row + row} has the largest magnitude {float(largest[row])}; its scale does not fit fp16"
        )
    codes = _codes(weight, scale)
    overflown = codes.abs().amax(dim=1) > limit  # [rows]
    if bool(overflown.any()):
        scale = torch.where(overflown, scale + SMALLEST_SCALE_STEP, scale)
        codes = _codes(weight, scale)
    return codes.to(torch.int8), scale


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    """Rounded quotients in the dtype of the weight, [rows, columns]; a row with scale 0 is 0."""
    divisor = torch.where(scale == 0, 1, scale).to(weight.dtype)
    # What a row with scale 0 holds is far below a half: divided by 1 it rounds to 0.
    return (weight / divisor[:, None]).round_()


def dequantize_rows(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Code · scale in `dtype`. packed: int8 [..., rows, bytes], scale [..., rows] → [..., rows, columns].

    The product is exact in fp32 (11 + 8 significant bits), so it is rounded once, to `dtype`.
    """
    check_bits(bits)
    codes = unpack_int4(packed) if bits == 4 else packed
    if dtype == torch.float16 and scale.dtype == torch.float16:
        return codes.half() * scale[..., None]  # the same single rounding, without an fp32 copy
    return (codes.float() * scale.float()[..., None]).to(dtype)
