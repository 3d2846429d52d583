"""One token through a linear: a stream over the weights at the speed of memory.

A program computes a few rows of the output. It loads its first weights before it waits for the kernel that makes the
input, so memory is busy across kernel borders, and the next ones before it works on those it has. Codes become floats
by bit patterns: a code placed in the top bits of a mantissa reads as 1 + code / 2^bits; what that adds to the sum is
the same for every row and is subtracted. Sums are fp32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl

from .device_parts import gelu, stream_place, wait_for_earlier_kernel


@triton.jit
def gemv_kernel(
    hidden,  # [COLUMNS] in stream order
    weight,  # [ROWS, COLUMNS], or words of 32 bits [ROWS, COLUMNS * BITS / 32]
    scale,  # fp16 [ROWS, COLUMNS / GROUP]
    bias,
    out,  # [ROWS]
    one,  # the bits of 1.0: as an argument it lives in a register, and masking and joining is one instruction
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,  # 16 (a float dtype), 8 or 4
    GROUP: tl.constexpr,  # columns that share a scale; COLUMNS for row-wise formats
    ORIGINAL: tl.constexpr,  # INT4 as two's complement, high half first
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    OUT_STREAMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WORDS: tl.constexpr,  # words (weights, if they are floats) of a row in one step
    OVERLAP: tl.constexpr,
):
    """Out = gelu(weight · hidden + bias); a program makes TILE_ROWS of it."""
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    real_rows = rows < ROWS
    streams: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    words: tl.constexpr = COLUMNS // streams
    group_words: tl.constexpr = GROUP // streams
    row_groups: tl.constexpr = words // group_words
    groups: tl.constexpr = TILE_WORDS if GROUP == COLUMNS else TILE_WORDS // group_words
    row_starts = weight + rows.to(tl.int64)[:, None] * words
    within = tl.arange(0, TILE_WORDS)[None, :]
    tile = tl.load(row_starts + within, real_rows[:, None] & (within < words), other=0)
    if BITS == 16 or GROUP == COLUMNS:
        total = tl.zeros([TILE_ROWS, TILE_WORDS], tl.float32)
    else:
        total = tl.zeros([TILE_ROWS, groups], tl.float32)
    for start in tl.static_range(0, words, TILE_WORDS):
        if start + TILE_WORDS < words:
            ahead = start + TILE_WORDS + within
            following = tl.load(row_starts + ahead, real_rows[:, None] & (ahead < words), other=0)
        if BITS < 16 and GROUP < COLUMNS:
            group = start // group_words + tl.arange(0, groups)
            scales = tl.load(
                scale + rows[:, None] * row_groups + group[None, :],
                real_rows[:, None] & (group < row_groups)[None, :],
                other=0,
            ).to(tl.float32)
        if start == 0:
            wait_for_earlier_kernel(OVERLAP)
        places = start + tl.arange(0, TILE_WORDS)
        if BITS == 16:
            vector = tl.load(hidden + places, places < words, other=0).to(tl.float32)
            total += tile.to(tl.float32) * vector[None, :]
        else:
            products = _products(tile, hidden + places, places < words, one, words, BITS, ORIGINAL)
            if GROUP == COLUMNS:
                total += products
            else:
                total += tl.sum(tl.reshape(products, [TILE_ROWS, groups, group_words]), axis=2) * scales
        if start + TILE_WORDS < words:
            tile = following
    result = tl.sum(total, axis=1)
    if BITS < 16:
        result *= 1 << BITS
        if GROUP == COLUMNS:
            result *= tl.load(scale + rows, real_rows, other=0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + rows, real_rows, other=0).to(tl.float32)
    if GELU:
        result = gelu(result)
    tl.store(out + stream_place(rows, OUT_STREAMS, ROWS), result.to(out.dtype.element_ty), real_rows)


@triton.jit
def _products(tile, hidden, real, one, words: tl.constexpr, BITS: tl.constexpr, ORIGINAL: tl.constexpr):
    """Σ over the codes of each word of code · x / 2^bits, fp32 [rows, words]; `hidden` at the words of the tile."""
    if ORIGINAL or BITS == 8:  # two's complement → offset by half of the range
        tile = tile ^ (-2004318072 if BITS == 4 else -2139062144)  # 0x88888888, 0x80808080
    products = tl.zeros(tile.shape, tl.float32)
    surplus = tl.zeros([tile.shape[1]], tl.float32)
    for byte in tl.static_range(4):
        moved = tile << (15 - 8 * byte) if byte < 2 else tile >> (8 * byte - 15)  # the byte in mantissa bits 15 … 22
        if BITS == 8:
            vector = tl.load(hidden + byte * words, real, other=0).to(tl.float32)
            products += (moved & 0x7F8000 | one).to(tl.float32, bitcast=True) * vector[None, :]
            surplus += 1.5 * vector
        else:
            low = tl.load(hidden + (2 * byte + ORIGINAL) * words, real, other=0).to(tl.float32)
            high = tl.load(hidden + (2 * byte + 1 - ORIGINAL) * words, real, other=0).to(tl.float32)
            low *= 16  # the low half stands four bits lower in the mantissa
            products += (moved & 0x78000 | one).to(tl.float32, bitcast=True) * low[None, :]
            products += (moved & 0x780000 | one).to(tl.float32, bitcast=True) * high[None, :]
            surplus += 1.03125 * low + 1.5 * high
    return products - surplus[None, :]
