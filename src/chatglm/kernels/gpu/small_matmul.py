"""A few tokens (2 to 64) through a linear: tensor cores, weights still read once and narrow.

A program computes some rows of the output for all tokens, over its share of the columns; the shares are summed by the
kernel that reads the output (always in the same order, so a run repeats exactly). A word's codes belong to different
streams of the input, so each stream is one product and nothing is shuffled. Codes are whole numbers in the input's
dtype; products are summed in fp32, scaled once a group where the tile allows it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl

from .device_parts import gelu, stream_place, wait_for_earlier_kernel


@triton.jit
def small_matmul_kernel(
    hidden,  # [tokens, COLUMNS] in stream order
    weight,  # [ROWS, COLUMNS], or words of 32 bits [ROWS, COLUMNS * BITS / 32]
    scale,  # fp16 [ROWS, COLUMNS / GROUP]
    bias,
    out,  # [SPLITS, tokens, ROWS]
    tokens,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ORIGINAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    OUT_STREAMS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Out[split] = the share of hidden · weightᵀ over some columns, with bias and gelu where there is one share."""
    streams: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    words: tl.constexpr = COLUMNS // streams
    group_words: tl.constexpr = GROUP // streams
    row_groups: tl.constexpr = words // group_words
    # More than one: the codes are scaled before the product.
    tile_groups: tl.constexpr = 1 if GROUP == COLUMNS else (TILE_WORDS + group_words - 1) // group_words
    share: tl.constexpr = (words + SPLITS * TILE_WORDS - 1) // (SPLITS * TILE_WORDS) * TILE_WORDS
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    split = tl.program_id(1)
    real_rows = rows < ROWS
    token = tl.arange(0, TILE_TOKENS)
    row_starts = weight + rows.to(tl.int64)[:, None] * words
    total = tl.zeros([TILE_ROWS, TILE_TOKENS], tl.float32)
    wait_for_earlier_kernel(OVERLAP)
    for step in range(0, share, TILE_WORDS):
        start = split * share + step
        places = start + tl.arange(0, TILE_WORDS)
        real = places < words
        tile = tl.load(row_starts + places[None, :], real_rows[:, None] & real[None, :], other=0)
        inputs = hidden + token[None, :] * COLUMNS + places[:, None]
        real_inputs = real[:, None] & (token < tokens)[None, :]
        if BITS == 16:
            total = tl.dot(tile, tl.load(inputs, real_inputs, other=0), total, input_precision="ieee")
        else:
            if tile_groups > 1:
                group = start // group_words + tl.arange(0, tile_groups)
                scales = tl.load(
                    scale + rows[:, None] * row_groups + group[None, :],
                    real_rows[:, None] & (group < row_groups)[None, :],
                    other=0,
                )
            part = tl.zeros([TILE_ROWS, TILE_TOKENS], tl.float32)
            for stream in tl.static_range(streams):
                codes = _codes(tile, stream, BITS, ORIGINAL, hidden.dtype.element_ty)
                if tile_groups > 1:
                    grouped = tl.reshape(codes, [TILE_ROWS, tile_groups, group_words])
                    grouped = (grouped * scales[:, :, None]).to(codes.dtype)
                    codes = tl.reshape(grouped, [TILE_ROWS, TILE_WORDS])
                column = (stream ^ 1 if ORIGINAL and BITS == 4 else stream) * words
                part = tl.dot(codes, tl.load(inputs + column, real_inputs, other=0), part, input_precision="ieee")
            if tile_groups == 1:
                scales = tl.load(scale + rows * row_groups + start // group_words, real_rows & (start < words), other=0)
                total += part * scales.to(tl.float32)[:, None]
            else:
                total += part
    if HAS_BIAS:
        total += tl.load(bias + rows, real_rows, other=0).to(tl.float32)[:, None]
    if GELU:
        total = gelu(total)
    places_out = (split * tokens + token)[None, :].to(tl.int64) * ROWS + stream_place(rows, OUT_STREAMS, ROWS)[:, None]
    tl.store(out + places_out, total.to(out.dtype.element_ty), real_rows[:, None] & (token < tokens)[None, :])


@triton.jit
def _codes(tile, STREAM: tl.constexpr, BITS: tl.constexpr, ORIGINAL: tl.constexpr, dtype: tl.constexpr):
    """The codes at one place of every word, as numbers in `dtype`."""
    if ORIGINAL or BITS == 8:  # two's complement → offset by half of the range
        tile = tile ^ (-2004318072 if BITS == 4 else -2139062144)  # 0x88888888, 0x80808080
    field = (tile >> (BITS * STREAM)) & ((1 << BITS) - 1)
    if dtype == tl.float16:  # or-ed into the mantissa of 1024
        codes = (field | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (1024 + (1 << (BITS - 1)))
    elif BITS == 4 and dtype == tl.bfloat16:  # of 128
        codes = (field | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 136
    else:
        codes = (field - (1 << (BITS - 1))).to(tl.float32)
    return codes.to(dtype)
