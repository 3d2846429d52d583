"""What many tokens need beside matrix products: rotary with cache write, GELU, whole weights expanded."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl

from .decode_attention import head_column, turned
from .device_parts import gelu
from .step_ends import embedded


@triton.jit
def split_heads_kernel(
    qkv,  # [tokens, 3 * HEADS * HEAD_DIM]
    cosines,  # fp32 [tokens, HEAD_DIM / 2]
    sines,
    keys,  # [slots, HEADS, HEAD_DIM]
    values,
    slots,  # int64 [tokens]
    out,  # [3, tokens, HEADS, HEAD_DIM]
    tokens,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROTARY_STREAMS: tl.constexpr,
    PER_HEAD: tl.constexpr,
):
    """Some heads of one token: turned query and key, value; key and value also into the cache."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    feature = tl.arange(0, BLOCK_DIM)[None, :]
    real = (head < HEADS) & (feature < HEAD_DIM)
    half: tl.constexpr = HEAD_DIM // ROTARY_STREAMS // 2
    within = feature % (2 * half)
    is_first = within < half
    partner = tl.where(is_first, feature + half, feature - half)
    angle = token * (HEAD_DIM // 2) + feature // (2 * half) * half + within % half
    cosine = tl.load(cosines + angle, feature < HEAD_DIM, other=0)
    sine = tl.load(sines + angle, feature < HEAD_DIM, other=0)
    row = qkv + token * (3 * HEADS * HEAD_DIM)
    target = token * (HEADS * HEAD_DIM) + head * HEAD_DIM + feature
    held = tl.load(slots + token) * (HEADS * HEAD_DIM) + head * HEAD_DIM + feature
    plane = tokens.to(tl.int64) * (HEADS * HEAD_DIM)
    for part in tl.static_range(2):
        plain = tl.load(row + head_column(part, head, feature, HEADS, HEAD_DIM, PER_HEAD), real, other=0)
        other = tl.load(row + head_column(part, head, partner, HEADS, HEAD_DIM, PER_HEAD), real, other=0)
        result = turned(plain.to(tl.float32), other.to(tl.float32), cosine, sine, is_first)
        tl.store(out + part * plane + target, result.to(out.dtype.element_ty), real)
        if part == 1:
            tl.store(keys + held, result.to(out.dtype.element_ty).to(keys.dtype.element_ty), real)
    value = tl.load(row + head_column(2, head, feature, HEADS, HEAD_DIM, PER_HEAD), real, other=0)
    tl.store(out + 2 * plane + target, value.to(out.dtype.element_ty), real)
    tl.store(values + held, value.to(out.dtype.element_ty).to(values.dtype.element_ty), real)


@triton.jit
def gelu_kernel(inner, count, BLOCK: tl.constexpr):
    """The tanh form of GELU, in place."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(inner + place, place < count, other=0)
    tl.store(inner + place, gelu(value.to(tl.float32)).to(inner.dtype.element_ty), place < count)


@triton.jit
def dequantize_kernel(
    table,
    scale,
    out,  # [rows, COLUMNS]
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ORIGINAL: tl.constexpr,
):
    """Some columns of one row of a quantised matrix, as floats."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < COLUMNS
    value = embedded(table, scale, row, column, real, COLUMNS, BITS, GROUP, ORIGINAL)
    tl.store(out + row * COLUMNS + column, value.to(out.dtype.element_ty), real)
