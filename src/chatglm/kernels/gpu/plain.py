"""The slow twins: every operation of a fast step in plain PyTorch, with the signatures of `launch`.

Outputs are written into tensors of the caller, as a captured graph needs it. A reader checks these against the paper;
tests hold the kernels equal to them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .packed import FusedNorm, PackedWeight
from .streams import from_streams, to_streams

KINDS = "torch"


def splits_of(weight: PackedWeight, tokens: int) -> int:
    """How many shares of the columns `linear` computes apart; the reader of its output sums them."""
    return 1


def pieces_of(num_heads: int, batch: int) -> int:
    """In how many pieces `decode_attention` takes a context."""
    return 1


def fuses(weight: PackedWeight, tokens: int) -> bool:
    """Whether `linear` can take the norm before it and the residual after it along."""
    return tokens == 1


def workspace(weights: list[PackedWeight]) -> tuple[Tensor, Tensor]:
    """What `linear` needs beside its arguments; for the kernels alone."""
    return torch.zeros(0), torch.zeros(0, dtype=torch.int32)


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
) -> None:
    """Out[0] + … + out[splits - 1] = gelu(norm(hidden) · weightᵀ + bias) + residual_scale · residual, summed in fp32.

    hidden     [tokens, columns] in the weight's stream order
    out        [splits, tokens, rows], any float dtype, in the order of `out_streams`; with anything added one split
    norm       one token, where `fuses` says so; so too `residual` [1, rows], in the order of `residual_streams`
    workspace  of the function `workspace`
    overlap    may start before the kernel before it ends (no effect on the result)
    """
    plain = from_streams(hidden, weight.streams).float()
    if norm is not None:
        gain, shift = (from_streams(part, weight.streams).float() for part in (norm.weight, norm.bias))
        plain = functional.layer_norm(plain, plain.shape[-1:], gain, shift, norm.epsilon)
        norm.normalised.copy_(plain[0])
    result = plain @ weight.dense(torch.float32).T
    if bias is not None:
        result = result + bias.float()
    if use_gelu:
        result = functional.gelu(result, approximate="tanh")
    if residual is not None:
        result = result + residual_scale * from_streams(residual, residual_streams).float()
    out.zero_()
    out[0] = to_streams(result, out_streams).to(out.dtype)


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
    """Out = LayerNorm(Σ parts + bias + residual_scale · residual), all in fp32 until it is stored.

    parts     [splits, tokens, hidden]
    residual  [tokens, hidden] in the order of `residual_streams`
    kept      [tokens, hidden] receives the sum before the norm
    out       [tokens, hidden] in stream order
    """
    value = parts.float().sum(dim=0)
    if bias is not None:
        value = value + bias.float()
    if residual is not None:
        value = value + residual_scale * from_streams(residual, residual_streams).float()
    if kept is not None:
        kept.copy_(value)
    normalised = functional.layer_norm(value, value.shape[-1:], norm_weight.float(), norm_bias.float(), epsilon)
    out.copy_(to_streams(normalised, streams))


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
    """Embeddings and rotations of one new token a sequence.

    ids, lengths   int32 [batch]; a length counts the new token and the P-tuning `prefix`
    position_*     int32 [2, batch]: position = base + step · place, for each of the rotary streams
    frequencies    fp32 [half]
    out            [batch, hidden] in the order of `streams`
    cosines, sines fp32 [batch, streams * half]
    """
    batch, half = ids.shape[0], frequencies.shape[0]
    rows = ids.long()
    if table.scale is None:
        values = table.data[rows].float()
    else:
        part = PackedWeight(
            table.data[rows], table.scale[rows], batch, table.columns, table.bits, table.group, table.is_original
        )
        values = part.dense(torch.float32)
    out.copy_(to_streams(values, streams))
    rotary_streams = cosines.shape[1] // half
    positions = (position_base + position_step * (lengths - 1 - prefix))[:rotary_streams].T
    angles = positions[:, :, None].float() * frequencies  # [batch, streams, half]
    cosines.copy_(angles.cos().flatten(1))
    sines.copy_(angles.sin().flatten(1))


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor, streams: int) -> Tensor:
    """Turn fp32 heads [tokens, heads, head_dim] by angles [tokens, head_dim / 2]."""
    first, second = heads.unflatten(-1, (streams, 2, -1)).unbind(-2)  # each [tokens, heads, streams, half]
    cos, sin = (angle.unflatten(-1, (streams, -1))[:, None] for angle in (cosines, sines))
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3)


def split_qkv(qkv: Tensor, num_heads: int, per_head: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[tokens, 3 * hidden] → query, key, value, each [tokens, heads, head_dim]."""
    if per_head:
        query, key, value = qkv.unflatten(-1, (num_heads, 3, -1)).unbind(-2)
    else:
        query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    return query, key, value


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
) -> None:
    """Rotary, cache write and attention of one new token a sequence.

    parts          [splits, batch, 3 * hidden]: query_key_value without its bias
    keys, values   [slots, heads, head_dim] of one layer; the new token's are written
    tables         int32 [batch, room]: slots of each sequence in order
    workspace      (fp32 [batch, heads, pieces, head_dim + 2], int32 zeros [batch, heads]) for the kernel
    out            [batch, hidden] in stream order
    """
    num_heads = keys.shape[1]
    qkv = parts.float().sum(dim=0)
    if bias is not None:
        qkv = qkv + bias.float()
    query, key, value = split_qkv(qkv, num_heads, per_head)  # [batch, heads, head_dim]
    query, key = rotate(query, cosines, sines, rotary_streams), rotate(key, cosines, sines, rotary_streams)
    last = (lengths - 1).long()
    newest = tables.long().gather(1, last[:, None])[:, 0]
    keys[newest] = key.to(keys.dtype)
    values[newest] = value.to(values.dtype)
    read = tables[:, : int(lengths.max())].long()  # [batch, longest]
    is_beyond = torch.arange(read.shape[1], device=read.device) >= lengths[:, None]
    read = read.masked_fill(is_beyond, 0)
    held_keys, held_values = keys[read].float(), values[read].float()  # [batch, longest, heads, head_dim]
    scores = torch.einsum("bhd,bkhd->bhk", query, held_keys) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(is_beyond[:, None], -torch.inf).softmax(dim=-1)
    mixed = torch.einsum("bhk,bkhd->bhd", weights, held_values.nan_to_num())
    out.copy_(to_streams(mixed.flatten(1), streams))


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
    """The best token of each row, written as the next step's input; lengths grow by one.

    logits    fp32 [batch, vocab]
    no_piece  int8 [vocab], 1 for rows that may not be chosen
    ids       int32 [batch]
    chosen    int32 [2, batch]: the token, and whether all scores of the row are finite
    """
    is_finite = torch.isfinite(logits)
    scores = logits.masked_fill(~is_finite, -torch.inf)
    if no_piece is not None:
        scores = scores.masked_fill(no_piece.bool(), -torch.inf)
    tokens = scores.argmax(dim=-1).int()
    ids.copy_(tokens)
    lengths += 1
    chosen[0] = tokens
    chosen[1] = is_finite.all(dim=-1)


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
    """Rotary and cache write of many tokens.

    qkv           [tokens, 3 * hidden], bias included
    cosines       fp32 [tokens, head_dim / 2]; sines the same
    keys, values  [slots, heads, head_dim] of one layer
    slots         int64 [tokens]
    out           [3, tokens, heads, head_dim]: turned query, turned key, value
    """
    num_heads = keys.shape[1]
    query, key, value = split_qkv(qkv.float(), num_heads, per_head)
    out[0] = rotate(query, cosines, sines, rotary_streams).to(out.dtype)
    out[1] = rotate(key, cosines, sines, rotary_streams).to(out.dtype)
    out[2] = value.to(out.dtype)
    keys[slots] = out[1].to(keys.dtype)
    values[slots] = out[2].to(values.dtype)


def gelu_(inner: Tensor) -> None:
    """The tanh form of GELU, in place."""
    inner.copy_(functional.gelu(inner.float(), approximate="tanh"))


def dequantize(weight: PackedWeight, out: Tensor) -> None:
    """All weights into `out` [rows, columns]."""
    out.copy_(weight.dense(out.dtype))
