"""Everything between two linears: sum their shares, add bias and residual, normalise, write the next input."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl

from .device_parts import stream_place, wait_for_earlier_kernel


@triton.jit
def norm_kernel(
    parts,  # [SPLITS, tokens, HIDDEN]
    bias,
    residual,  # [tokens, HIDDEN] in the order of RESIDUAL_STREAMS
    norm_weight,
    norm_bias,
    kept,  # [tokens, HIDDEN], the sum before the norm
    out,  # [tokens, HIDDEN] in stream order
    tokens,
    residual_scale,
    epsilon,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of 2, at least HIDDEN
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_STREAMS: tl.constexpr,
    KEEP: tl.constexpr,
    STREAMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Out = LayerNorm(Σ parts + bias + residual_scale · residual); a program makes one token's."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < HIDDEN
    weight = tl.load(norm_weight + column, real, other=0).to(tl.float32)
    shift = tl.load(norm_bias + column, real, other=0).to(tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + column, real, other=0).to(tl.float32)
    wait_for_earlier_kernel(OVERLAP)
    value = tl.load(parts + token * HIDDEN + column, real, other=0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        value += tl.load(parts + (split * tokens + token) * HIDDEN + column, real, other=0).to(tl.float32)
    if HAS_BIAS:
        value += added
    if HAS_RESIDUAL:
        place = stream_place(column, RESIDUAL_STREAMS, HIDDEN)
        value += residual_scale * tl.load(residual + token * HIDDEN + place, real, other=0).to(tl.float32)
    if KEEP:
        tl.store(kept + token * HIDDEN + column, value.to(kept.dtype.element_ty), real)
    mean = tl.sum(value, axis=0) / HIDDEN
    centred = tl.where(real, value - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / HIDDEN
    normalised = centred * tl.rsqrt(variance + epsilon) * weight + shift
    tl.store(out + token * HIDDEN + stream_place(column, STREAMS, HIDDEN), normalised.to(out.dtype.element_ty), real)
