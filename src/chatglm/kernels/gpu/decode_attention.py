"""Attention of one new token a sequence: rotary, cache write, attention over pieces of the context, merge. One kernel.

A program takes one head of one sequence and one piece of its context, streams keys and values once, and leaves a
partial (largest score, sum, output) in fp32. The last program of a head to finish merges the pieces, always in the
same order. Scores carry one factor head_dim^-0.5; the original's division and multiplication by (layer + 1) cancel.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl

from .device_parts import stream_place, wait_for_earlier_kernel


@triton.jit
def head_column(part, head, feature, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PER_HEAD: tl.constexpr):
    """Column of the query (part 0), key (1) or value (2) in the output of `query_key_value`."""
    if PER_HEAD:
        return (head * 3 + part) * HEAD_DIM + feature
    return (part * HEADS + head) * HEAD_DIM + feature


@triton.jit
def turned(first_load, second_load, cosine, sine, is_first):
    """One feature of a rotated head from itself and its partner half a stream away."""
    return first_load * cosine + tl.where(is_first, -second_load, second_load) * sine


@triton.jit
def decode_attention_kernel(
    parts,  # [SPLITS, batch, 3 * HEADS * HEAD_DIM], output of query_key_value without its bias
    bias,
    cosines,  # fp32 [batch, HEAD_DIM / 2]
    sines,
    keys,  # [slots, HEADS, HEAD_DIM] of this layer
    values,
    tables,  # int32 [batch, table_stride]: the slots of each sequence
    lengths,  # int32 [batch], the new token counted
    partial,  # fp32 [batch, HEADS, PIECES, HEAD_DIM + 2]
    tickets,  # int32 [batch, HEADS], all 0 before and after
    out,  # [batch, HEADS * HEAD_DIM] in stream order
    batch,
    table_stride,
    score_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,  # a power of 2, at least HEAD_DIM
    ROTARY_STREAMS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PIECES: tl.constexpr,
    TILE: tl.constexpr,  # tokens in one step
    STREAMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One head of one sequence over one piece of its context; the last piece to finish merges."""
    head = tl.program_id(0)
    piece = tl.program_id(1)
    row = tl.program_id(2)
    length = tl.load(lengths + row)
    piece_tokens = tl.cdiv(tl.cdiv(length, PIECES), TILE) * TILE
    active = tl.cdiv(length, piece_tokens)
    start = piece * piece_tokens
    held = length - 1  # tokens that earlier steps have written
    stop = tl.minimum(start + piece_tokens, held)
    feature = tl.arange(0, BLOCK_DIM)
    is_feature = feature < HEAD_DIM
    token = start + tl.arange(0, TILE)
    table = tables + row.to(tl.int64) * table_stride
    offset = head * HEAD_DIM + feature
    # The first tile is on its way before the new query is there.
    slot = tl.load(table + token, token < stop, other=0).to(tl.int64)
    places = slot[:, None] * (HEADS * HEAD_DIM) + offset[None, :]
    real = (token < stop)[:, None] & is_feature[None, :]
    key = tl.load(keys + places, real, other=0)
    value = tl.load(values + places, real, other=0)
    wait_for_earlier_kernel(OVERLAP)
    if piece < active:
        half: tl.constexpr = HEAD_DIM // ROTARY_STREAMS // 2
        within = feature % (2 * half)
        is_first = within < half
        partner = tl.where(is_first, feature + half, feature - half)
        angle = feature // (2 * half) * half + within % half
        cosine = tl.load(cosines + row * (HEAD_DIM // 2) + angle, is_feature, other=0)
        sine = tl.load(sines + row * (HEAD_DIM // 2) + angle, is_feature, other=0)
        query_column = head_column(0, head, feature, HEADS, HEAD_DIM, PER_HEAD)
        query_partner = head_column(0, head, partner, HEADS, HEAD_DIM, PER_HEAD)
        plain = _feature(parts, bias, query_column, row, batch, is_feature, 3 * HEADS * HEAD_DIM, SPLITS, HAS_BIAS)
        other = _feature(parts, bias, query_partner, row, batch, is_feature, 3 * HEADS * HEAD_DIM, SPLITS, HAS_BIAS)
        query = turned(plain, other, cosine, sine, is_first) * score_scale

        largest = -float("inf")
        total = 0.0
        mixed = tl.zeros([TILE, BLOCK_DIM], tl.float32)
        if piece == active - 1:  # this piece holds the new token
            key_column = head_column(1, head, feature, HEADS, HEAD_DIM, PER_HEAD)
            key_partner = head_column(1, head, partner, HEADS, HEAD_DIM, PER_HEAD)
            value_column = head_column(2, head, feature, HEADS, HEAD_DIM, PER_HEAD)
            width: tl.constexpr = 3 * HEADS * HEAD_DIM
            plain = _feature(parts, bias, key_column, row, batch, is_feature, width, SPLITS, HAS_BIAS)
            other = _feature(parts, bias, key_partner, row, batch, is_feature, width, SPLITS, HAS_BIAS)
            new_key = turned(plain, other, cosine, sine, is_first).to(keys.dtype.element_ty)
            new_value = _feature(parts, bias, value_column, row, batch, is_feature, width, SPLITS, HAS_BIAS)
            new_value = new_value.to(values.dtype.element_ty)
            new_place = tl.load(table + held).to(tl.int64) * (HEADS * HEAD_DIM) + offset
            tl.store(keys + new_place, new_key, is_feature)
            tl.store(values + new_place, new_value, is_feature)
            largest = tl.sum(query * new_key.to(tl.float32), axis=0)
            total = 1.0
            is_top = tl.arange(0, TILE) == 0
            mixed += tl.where(is_top[:, None], new_value.to(tl.float32)[None, :], 0.0)

        while start < stop:
            scores = tl.sum(query[None, :] * key.to(tl.float32), axis=1)
            scores = tl.where(token < stop, scores, -float("inf"))
            top = tl.maximum(largest, tl.max(scores, axis=0))
            weights = tl.exp(scores - top)
            shrink = tl.exp(largest - top)
            total = total * shrink + tl.sum(weights, axis=0)
            mixed = mixed * shrink + weights[:, None] * value.to(tl.float32)
            largest = top
            start += TILE
            token += TILE
            if start < stop:
                slot = tl.load(table + token, token < stop, other=0).to(tl.int64)
                places = slot[:, None] * (HEADS * HEAD_DIM) + offset[None, :]
                real = (token < stop)[:, None] & is_feature[None, :]
                key = tl.load(keys + places, real, other=0)
                value = tl.load(values + places, real, other=0)
        output = tl.sum(mixed, axis=0)  # [features]

        out_place = out + row * (HEADS * HEAD_DIM) + stream_place(offset, STREAMS, HEADS * HEAD_DIM)
        if active == 1:
            tl.store(out_place, (output / total).to(out.dtype.element_ty), is_feature)
        else:
            lot = partial + ((row * HEADS + head) * PIECES).to(tl.int64) * (HEAD_DIM + 2)
            mine = lot + piece * (HEAD_DIM + 2)
            tl.store(mine + feature, output, is_feature)
            tl.store(mine + HEAD_DIM, largest)
            tl.store(mine + HEAD_DIM + 1, total)
            tl.debug_barrier()  # all of it, before the ticket says so
            ticket = tl.atomic_add(tickets + row * HEADS + head, 1, sem="acq_rel")
            if ticket == active - 1:
                all_pieces = tl.arange(0, PIECES)
                there = all_pieces < active
                theirs = lot + all_pieces * (HEAD_DIM + 2)
                tops = tl.load(theirs + HEAD_DIM, there, other=-float("inf"), cache_modifier=".cg")
                totals = tl.load(theirs + HEAD_DIM + 1, there, other=0.0, cache_modifier=".cg")
                outputs = tl.load(
                    theirs[:, None] + feature[None, :],
                    there[:, None] & is_feature[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                weights = tl.exp(tops - tl.max(tops, axis=0))
                merged = tl.sum(outputs * weights[:, None], axis=0) / tl.sum(totals * weights, axis=0)
                tl.store(out_place, merged.to(out.dtype.element_ty), is_feature)
                tl.store(tickets + row * HEADS + head, 0)


@triton.jit
def _feature(parts, bias, column, row, batch, real, WIDTH: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Features of the new token: shares of query_key_value summed, and its bias."""
    value = tl.load(parts + row * WIDTH + column, real, other=0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        value += tl.load(parts + (split * batch + row) * WIDTH + column, real, other=0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, real, other=0).to(tl.float32)
    return value
