"""The two ends of a decode step: ids to embeddings and rotations, logits to the best tokens."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl

from .device_parts import stream_place, wait_for_earlier_kernel


@triton.jit
def embed_kernel(
    ids,  # int32 [batch]
    table,  # [vocab, HIDDEN], or words of 32 bits
    scale,  # fp16 [vocab, HIDDEN / GROUP]
    lengths,  # int32 [batch], the new token counted
    position_base,  # int32 [2, stride]: position = base + step * place in the sequence
    position_step,
    frequencies,  # fp32 [HALF]
    out,  # [batch, HIDDEN] in stream order
    cosines,  # fp32 [batch, ROTARY_STREAMS * HALF]
    sines,
    position_stride,
    prefix,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ORIGINAL: tl.constexpr,
    ROTARY_STREAMS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    STREAMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Embedding and rotation of one sequence's new token."""
    wait_for_earlier_kernel(OVERLAP)
    row = tl.program_id(0)
    token = tl.load(ids + row).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < HIDDEN
    value = embedded(table, scale, token, column, real, HIDDEN, BITS, GROUP, ORIGINAL)
    place = row * HIDDEN + stream_place(column, STREAMS, HIDDEN)
    tl.store(out + place, value.to(out.dtype.element_ty), real)
    spot = tl.load(lengths + row) - 1 - prefix
    pair = tl.arange(0, BLOCK_HALF)
    frequency = tl.load(frequencies + pair, pair < HALF, other=0)
    for stream in tl.static_range(ROTARY_STREAMS):
        rule = stream * position_stride + row
        position = tl.load(position_base + rule) + tl.load(position_step + rule) * spot
        angle = position.to(tl.float32) * frequency
        target = (row * ROTARY_STREAMS + stream) * HALF + pair
        tl.store(cosines + target, tl.cos(angle), pair < HALF)
        tl.store(sines + target, tl.sin(angle), pair < HALF)


@triton.jit
def embedded(
    table,
    scale,
    token,
    column,
    real,
    HIDDEN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ORIGINAL: tl.constexpr,
):
    """Some columns of one row of an embedding of any format, fp32."""
    if BITS == 16:
        value = tl.load(table + token * HIDDEN + column, real, other=0).to(tl.float32)
    else:
        streams: tl.constexpr = 32 // BITS
        word = tl.load(table + token * (HIDDEN // streams) + column // streams, real, other=0)
        if ORIGINAL or BITS == 8:  # two's complement → offset by half of the range
            word = word ^ (-2004318072 if BITS == 4 else -2139062144)  # 0x88888888, 0x80808080
        stream = column % streams
        if ORIGINAL and BITS == 4:
            stream = stream ^ 1
        code = ((word >> (BITS * stream)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
        factor = tl.load(scale + token * (HIDDEN // GROUP) + column // GROUP, real, other=0).to(tl.float32)
        value = code.to(tl.float32) * factor
    return value


@triton.jit
def best_of_chunk_kernel(
    logits,  # fp32 [batch, VOCAB]
    no_piece,  # int8 [VOCAB], 1 for rows that may not be chosen
    tops,  # fp32 [batch, CHUNKS]
    places,  # int32 [batch, CHUNKS]
    finite,  # int32 [batch, CHUNKS]
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_NO_PIECE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The best score of one chunk of one row, where it is, and whether all are finite."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    real = column < VOCAB
    wait_for_earlier_kernel(OVERLAP)
    score = tl.load(logits + row.to(tl.int64) * VOCAB + column, real, other=0.0)
    is_finite = tl.abs(score) < float("inf")  # false for NaN too
    tl.store(finite + row * CHUNKS + chunk, tl.min(is_finite.to(tl.int32), axis=0))
    allowed = real & is_finite
    if HAS_NO_PIECE:
        allowed = allowed & (tl.load(no_piece + column, real, other=1) == 0)
    score = tl.where(allowed, score, -float("inf"))
    top, place = tl.max(score, axis=0, return_indices=True)
    tl.store(tops + row * CHUNKS + chunk, top)
    tl.store(places + row * CHUNKS + chunk, chunk * CHUNK + place)


@triton.jit
def best_token_kernel(
    tops,
    places,
    finite,
    ids,  # int32 [batch]: the next step's input
    lengths,  # int32 [batch]: one more
    chosen,  # int32 [2, batch]: tokens, and whether all scores were finite
    batch,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The best of the chunks, written as the next step's input."""
    wait_for_earlier_kernel(OVERLAP)
    row = tl.program_id(0)
    chunk = tl.arange(0, BLOCK)
    real = chunk < CHUNKS
    best = tl.argmax(tl.load(tops + row * CHUNKS + chunk, real, other=-float("inf")), axis=0)
    token = tl.load(places + row * CHUNKS + best)
    is_finite = tl.min(tl.load(finite + row * CHUNKS + chunk, real, other=1), axis=0)
    tl.store(ids + row, token)
    tl.store(lengths + row, tl.load(lengths + row) + 1)
    tl.store(chosen + row, token)
    tl.store(chosen + batch + row, is_finite)
