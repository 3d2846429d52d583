"""Starting the Triton kernels: the signatures of `plain`, tile sizes by shape.

Import only behind `probe.choose_kernels`. Tile sizes were measured on Hopper (benchmarks/gpu_kernels.py); what they
change is speed alone.
"""

# mypy: disable-error-code="no-untyped-call, import-not-found"
from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import decode_attention as attention_kernels
from . import gemv, prefill_parts, small_matmul, step_ends
from . import norm as norm_kernels
from .packed import FusedNorm, PackedWeight

KINDS = "triton"

ONE = 0x3F800000
"""The bits of 1.0 in fp32."""


def _options(overlap: bool, warps: int, stages: int = 3) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    if overlap:
        options["launch_pdl"] = True
    return options


FULL_WORDS = {8: 1024, 4: 512}
"""Words of 4,096 columns, four to a thread: one chunk of a row, whose inputs stay in registers."""

PROGRAMS = 512
"""About as many INT4 programs for one token as run at once: more tiles a program are better than a second wave."""

MOST_TILES = 8

SMALL_ROWS = 4096
"""Up to so many rows of one chunk a matrix is too small to hide what a program costs before its first row."""


def gemv_tile(weight: PackedWeight) -> tuple[int, int, int, int]:
    """(rows, words, warps, tiles) of a program for one token."""
    words = triton.next_power_of_2(weight.columns // weight.streams)
    if weight.bits == 16:
        return 1, min(words, 4096), 8, 1
    group_words = 1 if weight.group == weight.columns else weight.group // weight.streams
    chunk = max(min(words, FULL_WORDS[weight.bits]), group_words)
    warps = FULL_WORDS[weight.bits] // 128
    chunks = triton.cdiv(words, chunk)
    is_small = weight.rows * chunks <= SMALL_ROWS
    if weight.bits == 8:
        return (4, chunk, warps, 4) if is_small else (8, chunk, warps, 1)
    if is_small or chunks > 1:
        return 8, chunk, warps, 1
    return 4, chunk, warps, max(1, min(MOST_TILES, weight.rows // (4 * PROGRAMS)))


def fuses(weight: PackedWeight, tokens: int) -> bool:
    """Whether `linear` can normalise its input: one token, codes, and a row that is one chunk."""
    if tokens > 1 or weight.bits == 16:
        return False
    return gemv_tile(weight)[1] * weight.streams >= weight.columns


def workspace(weights: list[PackedWeight]) -> tuple[Tensor, Tensor]:
    """What `linear` needs for one token where rows are several chunks, for the largest of these weights."""
    device = weights[0].data.device
    chunked = [w for w in weights if w.bits < 16]
    size = max((w.rows * triton.cdiv(w.columns // w.streams, gemv_tile(w)[1]) for w in chunked), default=0)
    rows = max((w.rows for w in chunked), default=0)
    partial = torch.zeros(size, dtype=torch.float32, device=device)
    return partial, torch.zeros(rows, dtype=torch.int32, device=device)


def matmul_tile(weight: PackedWeight, tokens: int) -> tuple[int, int, int, int]:
    """(rows, words, warps, stages) of a program for a few tokens."""
    words = triton.next_power_of_2(weight.columns // weight.streams)
    stages = {16: 4, 8: 3, 4: 3 if tokens <= 16 else 2}[weight.bits]
    return 64, max(16, min(words, 64)), 4, stages


def splits_of(weight: PackedWeight, tokens: int) -> int:
    """How many shares of the columns a few tokens are computed in, so that all multiprocessors have work."""
    if tokens == 1:
        return 1
    rows, words, _, _ = matmul_tile(weight, tokens)
    programs = triton.cdiv(weight.rows, rows)
    steps = triton.cdiv(weight.columns // weight.streams, words)
    splits = 1
    while programs * splits < 256 and splits < 8 and steps >= 4 * splits:
        splits *= 2
    return splits


def pieces_of(num_heads: int, batch: int) -> int:
    """In how many pieces decode_attention takes a context, so that there are programs enough."""
    return int(min(8, triton.next_power_of_2(max(1, 512 // (num_heads * batch)))))


def linear(
    hidden: Tensor,
    weight: PackedWeight,
    out: Tensor,
    *,
    norm: FusedNorm | None = None,
    bias: Tensor | None = None,
    use_gelu: bool = False,
    residual: Tensor | None = None,
    residual_streams: int = 1,
    residual_scale: float = 1.0,
    out_streams: int = 1,
    workspace: tuple[Tensor, Tensor] | None = None,
    overlap: bool = False,
    tile: tuple[int, ...] | None = None,
) -> None:
    """See plain.linear. At most 64 tokens; `tile` replaces gemv_tile or matmul_tile."""
    tokens = hidden.shape[0]
    shared = {
        "ROWS": weight.rows,
        "COLUMNS": weight.columns,
        "HAS_BIAS": bias is not None,
        "GELU": use_gelu,
        "OUT_STREAMS": out_streams,
        "OVERLAP": overlap,
    }
    quantised = {"BITS": weight.bits, "GROUP": weight.group, "ORIGINAL": int(weight.is_original)}
    added = weight.data if bias is None else bias
    if tokens == 1 and weight.scale is not None:
        _gemv(
            hidden, weight, out, norm, added, residual, residual_streams, residual_scale, workspace,
            tile or gemv_tile(weight), {**shared, **quantised},
        )  # fmt: skip
        return
    assert norm is None and residual is None, "only one token through codes has a norm or a residual in it"
    if tokens == 1:
        rows, columns, warps, _ = tile or gemv_tile(weight)
        gemv.float_gemv_kernel[(triton.cdiv(weight.rows, rows),)](
            hidden, weight.data, added, out, TILE_ROWS=rows, TILE=columns, **shared, **_options(overlap, warps)
        )  # fmt: skip
        return
    rows, words, warps, stages = tile or matmul_tile(weight, tokens)
    splits = out.shape[0]
    scale = weight.data if weight.scale is None else weight.scale
    small_matmul.small_matmul_kernel[(triton.cdiv(weight.rows, rows), splits)](
        hidden, weight.data, scale, added, out, tokens,
        TILE_TOKENS=max(16, triton.next_power_of_2(tokens)), TILE_ROWS=rows, TILE_WORDS=words, SPLITS=splits,
        **shared, **quantised, **_options(overlap, warps, stages),
    )  # fmt: skip


def _gemv(
    hidden: Tensor,
    weight: PackedWeight,
    out: Tensor,
    norm: FusedNorm | None,
    bias: Tensor,
    residual: Tensor | None,
    residual_streams: int,
    residual_scale: float,
    workspace: tuple[Tensor, Tensor] | None,
    tile: tuple[int, ...],
    shared: dict[str, Any],
) -> None:
    rows, words, warps, tiles = tile
    chunks = triton.cdiv(weight.columns // weight.streams, words)
    assert workspace is not None or chunks == 1, "rows of several chunks need a workspace"
    partial, tickets = workspace or (out, out)
    gemv.gemv_kernel[(triton.cdiv(weight.rows, rows * tiles), chunks)](
        hidden, weight.data, weight.scale, bias, out if residual is None else residual,
        hidden if norm is None else norm.weight, hidden if norm is None else norm.bias,
        hidden if norm is None else norm.normalised, out, partial, tickets,
        residual_scale, 0.0 if norm is None else norm.epsilon, ONE,
        NORM=norm is not None, HAS_RESIDUAL=residual is not None, RESIDUAL_STREAMS=residual_streams,
        TILE_ROWS=rows, TILE_WORDS=words, TILES=tiles, CHUNKS=chunks,
        maxnreg=128, **shared, **_options(shared["OVERLAP"], warps),
    )  # fmt: skip


def norm(
    parts: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_streams: int = 1,
    residual_scale: float = 1.0,
    kept: Tensor | None = None,
    streams: int = 1,
    overlap: bool = False,
) -> None:
    """See plain.norm."""
    splits, tokens, hidden = parts.shape
    block = triton.next_power_of_2(hidden)
    norm_kernels.norm_kernel[(tokens,)](
        parts, parts if bias is None else bias, out if residual is None else residual, norm_weight, norm_bias,
        out if kept is None else kept, out, tokens, residual_scale, epsilon,
        HIDDEN=hidden, BLOCK=block, SPLITS=splits, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        RESIDUAL_STREAMS=residual_streams, KEEP=kept is not None, STREAMS=streams, OVERLAP=overlap,
        **_options(overlap, max(1, min(8, block // 256))),
    )  # fmt: skip


def embed(
    ids: Tensor,
    table: PackedWeight,
    lengths: Tensor,
    position_base: Tensor,
    position_step: Tensor,
    frequencies: Tensor,
    prefix: int,
    out: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    streams: int = 1,
    overlap: bool = False,
) -> None:
    """See plain.embed."""
    half = frequencies.shape[0]
    scale = table.data if table.scale is None else table.scale
    step_ends.embed_kernel[(ids.shape[0],)](
        ids, table.data, scale, lengths, position_base, position_step, frequencies, out, cosines, sines,
        position_base.stride(0), prefix,
        HIDDEN=table.columns, BLOCK=triton.next_power_of_2(table.columns), BITS=table.bits, GROUP=table.group,
        ORIGINAL=int(table.is_original), ROTARY_STREAMS=cosines.shape[1] // half, HALF=half, STREAMS=streams,
        BLOCK_HALF=triton.next_power_of_2(half), OVERLAP=overlap, **_options(overlap, 8),
    )  # fmt: skip


def decode_attention(
    parts: Tensor,
    bias: Tensor | None,
    cosines: Tensor,
    sines: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    workspace: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    rotary_streams: int,
    per_head: bool,
    pieces: int = 1,
    streams: int = 1,
    overlap: bool = False,
    tile: tuple[int, int] | None = None,
) -> None:
    """See plain.decode_attention; `tile` is (tokens, warps) of a program's step."""
    splits, batch, _ = parts.shape
    _, num_heads, head_dim = keys.shape
    partial, tickets = workspace
    tokens, warps = tile or ((64, 4) if batch == 1 else (16, 2))
    attention_kernels.decode_attention_kernel[(num_heads, pieces, batch)](
        parts, parts if bias is None else bias, cosines, sines, keys, values, tables, lengths, partial, tickets, out,
        batch, tables.stride(0), head_dim**-0.5,
        HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim), ROTARY_STREAMS=rotary_streams,
        PER_HEAD=per_head, SPLITS=splits, HAS_BIAS=bias is not None, PIECES=pieces, TILE=tokens, STREAMS=streams,
        OVERLAP=overlap, **_options(overlap, warps),
    )  # fmt: skip


CHUNK = 2048
"""Scores that one program of best_tokens looks at."""


def best_tokens(
    logits: Tensor,
    no_piece: Tensor | None,
    workspace: tuple[Tensor, Tensor, Tensor],
    ids: Tensor,
    lengths: Tensor,
    chosen: Tensor,
    *,
    overlap: bool = False,
) -> None:
    """See plain.best_tokens."""
    batch, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    tops, places, finite = workspace
    step_ends.best_of_chunk_kernel[(chunks, batch)](
        logits, logits if no_piece is None else no_piece, tops, places, finite,
        VOCAB=vocab, CHUNKS=chunks, CHUNK=CHUNK, HAS_NO_PIECE=no_piece is not None, OVERLAP=overlap,
        **_options(overlap, 4),
    )  # fmt: skip
    step_ends.best_token_kernel[(batch,)](
        tops, places, finite, ids, lengths, chosen, batch,
        CHUNKS=chunks, BLOCK=triton.next_power_of_2(chunks), OVERLAP=overlap, **_options(overlap, 1),
    )  # fmt: skip


def split_heads(
    qkv: Tensor,
    cosines: Tensor,
    sines: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    out: Tensor,
    *,
    rotary_streams: int,
    per_head: bool,
) -> None:
    """See plain.split_heads."""
    tokens = qkv.shape[0]
    _, num_heads, head_dim = keys.shape
    block_heads = min(16, triton.next_power_of_2(num_heads))
    prefill_parts.split_heads_kernel[(tokens, triton.cdiv(num_heads, block_heads))](
        qkv, cosines, sines, keys, values, slots, out, tokens,
        HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim), BLOCK_HEADS=block_heads,
        ROTARY_STREAMS=rotary_streams, PER_HEAD=per_head, num_warps=4,
    )  # fmt: skip


def gelu_(inner: Tensor) -> None:
    """See plain.gelu_; contiguous."""
    prefill_parts.gelu_kernel[(triton.cdiv(inner.numel(), 2048),)](inner, inner.numel(), BLOCK=2048, num_warps=8)


def dequantize(weight: PackedWeight, out: Tensor) -> None:
    """See plain.dequantize."""
    block = min(2048, triton.next_power_of_2(weight.columns))
    assert weight.scale is not None and out.dtype != torch.float64
    prefill_parts.dequantize_kernel[(weight.rows, triton.cdiv(weight.columns, block))](
        weight.data, weight.scale, out,
        COLUMNS=weight.columns, BLOCK=block, BITS=weight.bits, GROUP=weight.group, ORIGINAL=int(weight.is_original),
        num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
