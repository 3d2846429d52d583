"""The project's own INT4 and INT8: one fp16 scale for each group of neighbouring columns. Pure functions.

INT4: uint8 [rows, columns / 2]; a byte holds an even column in its low half and the odd one after it in its high half,
each code + 8, so column order is bit order in a little-endian word. Codes are -8 … 7 and the scale carries the sign
of the group's largest weight, which so becomes exactly -8: one more step than -7 … 7. A search over clipping factors
keeps the scale with the smallest squared error (measured on the embedded model at groups of 128: perplexity +6.7%,
against +14.8% with plain largest / 7). INT8: int8 [rows, columns], codes -127 … 127. Scales: fp16 [rows, groups].
Source: Q4_0 of ggml for the signed scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import QuantizationError
from .row_format import check_bits, packed_columns

CLIP_FACTORS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)
"""Candidates of the search: the largest code stands for this share of the largest weight."""

CHUNK_ELEMENTS = 1 << 18
"""Weights searched at once; keeps temporary memory small and inside the cache."""


def check_group_size(columns: int, group_size: int) -> None:
    """Raises QuantizationError unless `columns` is made of whole groups of a multiple of 8 columns."""
    if group_size < 8 or group_size % 8:
        raise QuantizationError(f"a group of {group_size} columns is not possible", cure="use a multiple of 8")
    if columns % group_size:
        raise QuantizationError(
            f"{columns} columns are not a multiple of the group size {group_size}",
            cure="use a group size that divides every matrix, such as 32",
        )


def pack_pairs(codes: Tensor) -> Tensor:
    """Two codes a byte, offset by 8. codes: int8 [rows, columns], each -8 … 7 → uint8 [rows, columns / 2]."""
    packed_columns(codes.shape[-1], 4)
    offset = (codes + 8).to(torch.uint8)
    return offset[..., 0::2] | (offset[..., 1::2] << 4)


def unpack_pairs(packed: Tensor) -> Tensor:
    """The inverse of pack_pairs. uint8 [..., columns / 2] → int8 [..., columns]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int8) - 8


def quantize_groups(weight: Tensor, bits: int, group_size: int, *, search: bool = True) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix [rows, columns]: (uint8 [rows, columns / 2] or int8 [rows, columns], fp16 scales).

    search  INT4: try CLIP_FACTORS and keep the best for each group. Scales: [rows, columns / group_size].
    A group of zeros has scale 0 and codes 0. Raises QuantizationError for a value that is not finite, a group too
    large for an fp16 scale, and columns that are not whole groups.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise QuantizationError(f"only a floating matrix can be quantised, not {weight.dtype} {list(weight.shape)}")
    check_bits(bits)
    rows, columns = weight.shape
    check_group_size(columns, group_size)
    packed = weight.new_empty((rows, packed_columns(columns, bits)), dtype=torch.uint8 if bits == 4 else torch.int8)
    scales = weight.new_empty((rows, columns // group_size), dtype=torch.float16)
    if weight.is_meta:
        return packed, scales
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        groups = weight[start : start + step].float().unflatten(-1, (-1, group_size))  # [rows, groups, group_size]
        codes, scale = _search(groups, search) if bits == 4 else _symmetric(groups)
        _check_finite(scale, start)
        codes = codes.flatten(-2).to(torch.int8)
        packed[start : start + step] = pack_pairs(codes) if bits == 4 else codes
        scales[start : start + step] = scale
    return packed, scales


def _symmetric(groups: Tensor) -> tuple[Tensor, Tensor]:
    """INT8: the largest magnitude becomes 127."""
    scale = (groups.abs().amax(dim=-1) / 127).half()
    return _codes(groups, scale, 127, 127), scale


def _search(groups: Tensor, search: bool) -> tuple[Tensor, Tensor]:
    """INT4: the signed extreme becomes -8, or is clipped to it where that makes the squared error smaller."""
    extreme = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)  # [rows, groups], signed
    best_scale = (extreme / -8).half()
    best_codes = _codes(groups, best_scale, 8, 7)
    if not search:
        return best_codes, best_scale
    best_error = _squared_error(groups, best_codes, best_scale)
    for factor in CLIP_FACTORS[1:]:
        scale = (extreme * (factor / -8)).half()
        codes = _codes(groups, scale, 8, 7)
        error = _squared_error(groups, codes, scale)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_codes = torch.where(is_better[..., None], codes, best_codes)
    return best_codes, best_scale


def _codes(groups: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """Rounded quotients, fp32 [rows, groups, group_size]; 0 where the scale is 0."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
    return (groups * inverse[..., None]).round_().clamp_(-lowest, highest)


def _squared_error(groups: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return (codes * scale.float()[..., None]).sub_(groups).square_().sum(dim=-1)


def _check_finite(scale: Tensor, first_row: int) -> None:
    if not bool(torch.isfinite(scale).all()):
        row, group = (~torch.isfinite(scale)).nonzero()[0].tolist()
        raise QuantizationError(
            f"row {first_row + row}, group {group} holds a value that is not finite or too large for an fp16 scale"
        )


WIDE_BYTES = 1 << 23
"""Bytes of codes that are made fp32 at once."""


def dequantize_groups(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Code · scale in `dtype`. packed: [..., rows, bytes], scale [..., rows, groups] → [..., rows, columns].

    The product is exact in fp32 (11 + 8 significant bits), so it is rounded once, to `dtype`.
    """
    check_bits(bits)
    rows = packed.shape[0] if packed.dim() == 2 else 1
    most = max(1, WIDE_BYTES * rows // max(1, packed.numel()))
    if dtype != torch.float16 and rows > most:
        whole = packed.new_empty((rows, packed.shape[1] * (2 if bits == 4 else 1)), dtype=dtype)
        for start in range(0, rows, most):
            span = slice(start, start + most)
            whole[span] = dequantize_groups(packed[span], scale[span], bits, dtype)
        return whole
    codes = (unpack_pairs(packed) if bits == 4 else packed).unflatten(-1, (scale.shape[-1], -1))
    weights: Tensor
    if dtype == torch.float16 and scale.dtype == torch.float16:
        weights = codes.half() * scale[..., None]  # the same single rounding, without an fp32 copy
    else:
        weights = (codes.float() * scale.float()[..., None]).to(dtype)
    return weights.flatten(-2)
