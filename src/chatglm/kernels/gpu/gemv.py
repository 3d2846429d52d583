"""One token through a linear: a stream over the weights at the speed of memory.

A program computes a few tiles of rows. It loads its first tiles before it waits for the kernel that makes the input,
so memory is busy across kernel borders; then each tile is loaded while those before it are worked on. The norm before
a linear and the residual after it happen in here: a kernel of their own would leave the memory idle. Codes become
floats by bit patterns: a code placed in the top bits of a mantissa reads as 1 + code / 2^bits; what that adds to the
sum is the same for every row and is subtracted. Sums are fp32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl

from .device_parts import gelu, stream_place, wait_for_earlier_kernel


@triton.jit
def float_gemv_kernel(
    hidden,  # [COLUMNS]
    weight,  # [ROWS, COLUMNS]
    bias,
    out,  # [ROWS]
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    OUT_STREAMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE: tl.constexpr,  # columns in one step
    OVERLAP: tl.constexpr,
):
    """Out = gelu(weight · hidden + bias) for weights that are floats; a program makes TILE_ROWS of it."""
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    real_rows = rows < ROWS
    row_starts = weight + rows.to(tl.int64)[:, None] * COLUMNS
    within = tl.arange(0, TILE)
    tile = tl.load(row_starts + within[None, :], real_rows[:, None] & (within < COLUMNS)[None, :], other=0)
    total = tl.zeros([TILE_ROWS, TILE], tl.float32)
    for start in tl.static_range(0, COLUMNS, TILE):
        if start + TILE < COLUMNS:
            ahead = start + TILE + within
            following = tl.load(row_starts + ahead[None, :], real_rows[:, None] & (ahead < COLUMNS)[None, :], other=0)
        if start == 0:
            wait_for_earlier_kernel(OVERLAP)
        places = start + within
        vector = tl.load(hidden + places, places < COLUMNS, other=0).to(tl.float32)
        total += tile.to(tl.float32) * vector[None, :]
        if start + TILE < COLUMNS:
            tile = following
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + rows, real_rows, other=0).to(tl.float32)
    if GELU:
        result = gelu(result)
    tl.store(out + stream_place(rows, OUT_STREAMS, ROWS), result.to(out.dtype.element_ty), real_rows)


@triton.jit
def gemv_kernel(
    hidden,  # [COLUMNS] in stream order
    weight,  # words of 32 bits [ROWS, COLUMNS * BITS / 32]
    scale,  # fp16 [ROWS, COLUMNS / GROUP]
    bias,
    residual,  # [ROWS] in the order of RESIDUAL_STREAMS
    norm_weight,  # [COLUMNS] in stream order
    norm_bias,
    normalised,  # [COLUMNS] in the usual order: what the norm made of the input
    out,  # [ROWS] in the order of OUT_STREAMS
    partial,  # fp32 [CHUNKS, ROWS], where there are several chunks
    tickets,  # int32, one for each program of a chunk, 0 before and after
    residual_scale,
    epsilon,
    one,  # the bits of 1.0: as an argument it lives in a register, and masking and joining is one instruction
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,  # 8 or 4
    GROUP: tl.constexpr,  # columns that share a scale; COLUMNS for row-wise formats
    ORIGINAL: tl.constexpr,  # INT4 as two's complement, high half first
    NORM: tl.constexpr,  # normalise the input first
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_STREAMS: tl.constexpr,
    OUT_STREAMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WORDS: tl.constexpr,  # words of a chunk, a power of 2: its inputs stay in registers
    TILES: tl.constexpr,  # tiles of a program, one after the other
    CHUNKS: tl.constexpr,  # programs along a row; the last one to finish sums them
    OVERLAP: tl.constexpr,
):
    """Out = gelu(weight · norm(hidden) + bias) + residual_scale · residual; a program makes TILES * TILE_ROWS of it."""
    streams: tl.constexpr = 32 // BITS
    words: tl.constexpr = COLUMNS // streams
    program = tl.program_id(0)
    chunk = tl.program_id(1)
    first_row = program * (TILES * TILE_ROWS)
    places = chunk * TILE_WORDS + tl.arange(0, TILE_WORDS)
    real = places < words
    tile = _load_tile(weight, first_row, places, True, ROWS, words, TILE_ROWS)
    factors = _load_factors(scale, first_row, chunk, ROWS, COLUMNS, GROUP, BITS, TILE_ROWS, TILE_WORDS)
    following = _load_tile(weight, first_row + TILE_ROWS, places, TILES > 1, ROWS, words, TILE_ROWS)
    if NORM:
        gain, shift = norm_weight + places, norm_bias + places
        gain_a0, gain_b0 = _load_byte(gain, real, 0, words, BITS, ORIGINAL)
        gain_a1, gain_b1 = _load_byte(gain, real, 1, words, BITS, ORIGINAL)
        gain_a2, gain_b2 = _load_byte(gain, real, 2, words, BITS, ORIGINAL)
        gain_a3, gain_b3 = _load_byte(gain, real, 3, words, BITS, ORIGINAL)
        shift_a0, shift_b0 = _load_byte(shift, real, 0, words, BITS, ORIGINAL)
        shift_a1, shift_b1 = _load_byte(shift, real, 1, words, BITS, ORIGINAL)
        shift_a2, shift_b2 = _load_byte(shift, real, 2, words, BITS, ORIGINAL)
        shift_a3, shift_b3 = _load_byte(shift, real, 3, words, BITS, ORIGINAL)
    wait_for_earlier_kernel(OVERLAP)
    a0, b0 = _load_byte(hidden + places, real, 0, words, BITS, ORIGINAL)
    a1, b1 = _load_byte(hidden + places, real, 1, words, BITS, ORIGINAL)
    a2, b2 = _load_byte(hidden + places, real, 2, words, BITS, ORIGINAL)
    a3, b3 = _load_byte(hidden + places, real, 3, words, BITS, ORIGINAL)
    a0, a1, a2, a3 = a0.to(tl.float32), a1.to(tl.float32), a2.to(tl.float32), a3.to(tl.float32)
    b0, b1, b2, b3 = b0.to(tl.float32), b1.to(tl.float32), b2.to(tl.float32), b3.to(tl.float32)
    if NORM:
        mean = tl.sum(_sum(a0, b0, BITS) + _sum(a1, b1, BITS) + _sum(a2, b2, BITS) + _sum(a3, b3, BITS), axis=0)
        mean = mean / COLUMNS
        a0, a1, a2, a3 = a0 - mean, a1 - mean, a2 - mean, a3 - mean
        b0, b1, b2, b3 = b0 - mean, b1 - mean, b2 - mean, b3 - mean
        squares = _sum(a0 * a0, b0 * b0, BITS) + _sum(a1 * a1, b1 * b1, BITS)
        squares += _sum(a2 * a2, b2 * b2, BITS) + _sum(a3 * a3, b3 * b3, BITS)
        inverse = tl.rsqrt(tl.sum(tl.where(real, squares, 0.0), axis=0) / COLUMNS + epsilon)
        a0, a1 = a0 * inverse * gain_a0 + shift_a0, a1 * inverse * gain_a1 + shift_a1  # 0 where nothing is real
        a2, a3 = a2 * inverse * gain_a2 + shift_a2, a3 * inverse * gain_a3 + shift_a3
        b0, b1 = b0 * inverse * gain_b0 + shift_b0, b1 * inverse * gain_b1 + shift_b1
        b2, b3 = b2 * inverse * gain_b2 + shift_b2, b3 * inverse * gain_b3 + shift_b3
        if program == 0:
            kept = normalised + places * streams
            _store_byte(kept, a0, b0, real, 0, BITS, ORIGINAL)
            _store_byte(kept, a1, b1, real, 1, BITS, ORIGINAL)
            _store_byte(kept, a2, b2, real, 2, BITS, ORIGINAL)
            _store_byte(kept, a3, b3, real, 3, BITS, ORIGINAL)
    if BITS == 4:  # the low half of a byte stands four bits lower in the mantissa
        a0, a1, a2, a3 = a0 * 16, a1 * 16, a2 * 16, a3 * 16
        surplus = 1.03125 * (a0 + a1 + a2 + a3) + 1.5 * (b0 + b1 + b2 + b3)
    else:
        surplus = 1.5 * (a0 + a1 + a2 + a3)
    for number in range(TILES):
        row = first_row + number * TILE_ROWS
        third = _load_tile(weight, row + 2 * TILE_ROWS, places, number + 2 < TILES, ROWS, words, TILE_ROWS)
        later = _load_factors(scale, row + TILE_ROWS, chunk, ROWS, COLUMNS, GROUP, BITS, TILE_ROWS, TILE_WORDS)
        products = tl.zeros([TILE_ROWS, TILE_WORDS], tl.float32) - surplus[None, :]
        products = _add_byte(products, tile << 15, a0, b0, one, BITS, ORIGINAL)
        products = _add_byte(products, tile << 7, a1, b1, one, BITS, ORIGINAL)
        products = _add_byte(products, tile >> 1, a2, b2, one, BITS, ORIGINAL)
        products = _add_byte(products, tile >> 9, a3, b3, one, BITS, ORIGINAL)
        result = _scaled_sum(products, factors, GROUP == COLUMNS, BITS)
        if CHUNKS == 1:
            _finish(
                result, bias, residual, residual_scale, out, row,
                ROWS, HAS_BIAS, GELU, HAS_RESIDUAL, RESIDUAL_STREAMS, OUT_STREAMS, TILE_ROWS,
            )  # fmt: skip
        else:
            rows = row + tl.arange(0, TILE_ROWS)
            tl.store(partial + chunk * ROWS + rows, result, rows < ROWS)
        tile = following
        following = third
        factors = later
    if CHUNKS > 1:
        tl.debug_barrier()  # all of it, before the ticket says so
        ticket = tl.atomic_add(tickets + program, 1, sem="acq_rel")
        if ticket == CHUNKS - 1:
            for number in range(TILES):
                row = first_row + number * TILE_ROWS
                rows = row + tl.arange(0, TILE_ROWS)
                result = tl.zeros([TILE_ROWS], tl.float32)
                for other in tl.static_range(CHUNKS):
                    result += tl.load(partial + other * ROWS + rows, rows < ROWS, other=0, cache_modifier=".cg")
                _finish(
                    result, bias, residual, residual_scale, out, row,
                    ROWS, HAS_BIAS, GELU, HAS_RESIDUAL, RESIDUAL_STREAMS, OUT_STREAMS, TILE_ROWS,
                )  # fmt: skip
            tl.store(tickets + program, 0)


@triton.jit
def _load_tile(weight, first_row, places, wanted, ROWS: tl.constexpr, words: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Words of some rows, int32 [TILE_ROWS, places]."""
    rows = first_row + tl.arange(0, TILE_ROWS)
    real = ((rows < ROWS) & wanted)[:, None] & (places < words)[None, :]
    return tl.load(weight + rows.to(tl.int64)[:, None] * words + places[None, :], real, other=0)


@triton.jit
def _load_byte(vector, real, byte: tl.constexpr, words: tl.constexpr, BITS: tl.constexpr, ORIGINAL: tl.constexpr):
    """Of a vector in stream order what belongs to one byte of each word: to its low and its high half; INT8 has one."""
    if BITS == 8:
        low = tl.load(vector + byte * words, real, other=0)
        high = low
    else:
        low = tl.load(vector + (2 * byte + ORIGINAL) * words, real, other=0)
        high = tl.load(vector + (2 * byte + 1 - ORIGINAL) * words, real, other=0)
    return low, high


@triton.jit
def _store_byte(vector, low, high, real, byte: tl.constexpr, BITS: tl.constexpr, ORIGINAL: tl.constexpr):
    """The same, written in the usual order; `vector` at the first column of each word."""
    if BITS == 8:
        tl.store(vector + byte, low.to(vector.dtype.element_ty), real)
    else:
        tl.store(vector + 2 * byte + ORIGINAL, low.to(vector.dtype.element_ty), real)
        tl.store(vector + 2 * byte + 1 - ORIGINAL, high.to(vector.dtype.element_ty), real)


@triton.jit
def _sum(low, high, BITS: tl.constexpr):
    return low if BITS == 8 else low + high


@triton.jit
def _add_byte(total, moved, low, high, one, BITS: tl.constexpr, ORIGINAL: tl.constexpr):
    """Add (1 + code / 2^bits) · x for the codes of one byte, which was moved to the mantissa's bits 15 to 22.

    Joining by exclusive or turns the top bit of two's complement codes on the way: they are offset by half the range.
    """
    if BITS == 8:
        total += (moved & 0x7F8000 ^ (one ^ 0x400000)).to(tl.float32, bitcast=True) * high[None, :]
    else:  # the low half stands four bits lower, its input comes times 16
        one_low = one ^ 0x40000 if ORIGINAL else one
        one_high = one ^ 0x400000 if ORIGINAL else one
        total += (moved & 0x78000 ^ one_low).to(tl.float32, bitcast=True) * low[None, :]
        total += (moved & 0x780000 ^ one_high).to(tl.float32, bitcast=True) * high[None, :]
    return total


@triton.jit
def _load_factors(
    scale,
    first_row,
    chunk,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
):
    """Scales of a tile: [TILE_ROWS, groups], or [TILE_ROWS] for row-wise formats."""
    rows = first_row + tl.arange(0, TILE_ROWS)
    if GROUP == COLUMNS:
        factors = tl.load(scale + rows, rows < ROWS, other=0)
    else:
        group_words: tl.constexpr = GROUP * BITS // 32
        groups: tl.constexpr = TILE_WORDS // group_words
        group = chunk * groups + tl.arange(0, groups)
        real = (rows < ROWS)[:, None] & (group < COLUMNS // GROUP)[None, :]
        factors = tl.load(scale + rows[:, None] * (COLUMNS // GROUP) + group[None, :], real, other=0)
    return factors


@triton.jit
def _scaled_sum(products, factors, BY_ROW: tl.constexpr, BITS: tl.constexpr):
    """Σ over the words of a tile, each group times its scale, fp32 [rows]."""
    if BY_ROW:
        result = tl.sum(products, axis=1) * factors.to(tl.float32)
    else:
        grouped = tl.reshape(products, [products.shape[0], factors.shape[1], products.shape[1] // factors.shape[1]])
        result = tl.sum(tl.sum(grouped, axis=2) * factors.to(tl.float32), axis=1)
    return result * (1 << BITS)


@triton.jit
def _finish(
    result,
    bias,
    residual,
    residual_scale,
    out,
    first_row,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_STREAMS: tl.constexpr,
    OUT_STREAMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Bias, gelu, residual, and the store."""
    rows = first_row + tl.arange(0, TILE_ROWS)
    if HAS_BIAS:
        result += tl.load(bias + rows, rows < ROWS, other=0).to(tl.float32)
    if GELU:
        result = gelu(result)
    if HAS_RESIDUAL:
        place = stream_place(rows, RESIDUAL_STREAMS, ROWS)
        result += residual_scale * tl.load(residual + place, rows < ROWS, other=0).to(tl.float32)
    tl.store(out + stream_place(rows, OUT_STREAMS, ROWS), result.to(out.dtype.element_ty), rows < ROWS)
