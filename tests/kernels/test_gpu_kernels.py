"""Every Triton kernel equals its slow twin in plain PyTorch: random inputs, odd sizes, outputs poisoned with NaN.

Without a CUDA device Triton's interpreter runs the kernels on the CPU; without Triton the tests are skipped.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

from chatglm.kernels.gpu import FusedNorm, PackedWeight, from_streams, plain, to_streams
from chatglm.quantization import (
    GroupQuantizedEmbedding,
    GroupQuantizedLinear,
    RowQuantizedEmbedding,
    RowQuantizedLinear,
)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # 1 / (1 + inf) is the 0 we want

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are defined
pytest.importorskip("triton", reason="Triton is not installed")

from chatglm.kernels.gpu import launch  # noqa: E402

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative errors that the dtypes allow (‖out − twin‖ / ‖twin‖)."""

FORMATS = ["float", "int8", "int4", "int8-row", "int4-row"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype).to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def assert_near(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert torch.isfinite(actual.float()).all()
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error <= bound, f"relative error {error:.2e}"


def weight_of(kind: str, rows: int, columns: int, dtype: torch.dtype = torch.float16, group: int = 32) -> PackedWeight:
    bits = 8 if "8" in kind else 4
    module: nn.Module
    if kind == "float":
        module = nn.Linear(columns, rows, bias=False, dtype=dtype)
    elif kind.endswith("row"):
        module = RowQuantizedLinear(columns, rows, bits, bias=False)
    else:
        module = GroupQuantizedLinear(columns, rows, bits, group, bias=False)
    values = torch.randn(rows, columns, generator=generator(rows))
    if kind == "float":
        module.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    else:
        module.quantize_(values)
    packed = PackedWeight.of(module.to(DEVICE))
    assert packed is not None
    return packed


@pytest.mark.parametrize("streams", [1, 4, 8])
def test_stream_order_is_undone(streams: int) -> None:
    vectors = random(3, 32)
    assert torch.equal(from_streams(to_streams(vectors, streams), streams), vectors)
    assert to_streams(torch.arange(16), 8).tolist() == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_packed_weight_expands_to_the_weights_of_its_module(kind: str) -> None:
    weight = weight_of(kind, 6, 64)
    module_bits = 16 if kind == "float" else int(kind[3])
    assert (weight.rows, weight.columns, weight.bits) == (6, 64, module_bits)
    assert weight.dense(torch.float32).shape == (6, 64)


def test_a_weight_of_an_unreadable_shape_is_left_to_plain_pytorch() -> None:
    assert PackedWeight.of(GroupQuantizedLinear(48, 4, 4, 24)) is None
    assert PackedWeight.of(RowQuantizedLinear(6, 4, 8)) is None


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_one_token_through_a_linear(kind: str, dtype: torch.dtype) -> None:
    weight = weight_of(kind, 21, 96, dtype)
    hidden = to_streams(random(1, 96, dtype=dtype, seed=1), weight.streams)
    out, expected = poisoned(1, 1, 21), poisoned(1, 1, 21)
    launch.linear(hidden, weight, out)
    plain.linear(hidden, weight, expected)
    assert_near(out, expected, 1e-5)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tile", [(4, 64, 4, 3), (2, 16, 1, 1), (8, 128, 4, 2), (4, 32, 2, 2)])
def test_tile_sizes_and_chunks_of_one_token_change_nothing(kind: str, tile: tuple[int, int, int, int]) -> None:
    group = 32 if kind == "int8" else 64
    weight = weight_of(kind, 21, 320, group=group)
    hidden = to_streams(random(1, 320, dtype=torch.float16, seed=1), weight.streams)
    out, expected = poisoned(1, 1, 21), poisoned(1, 1, 21)
    workspace = poisoned(21 * 20), torch.zeros(21, dtype=torch.int32, device=DEVICE)
    launch.linear(hidden, weight, out, tile=tile, workspace=workspace)
    plain.linear(hidden, weight, expected)
    assert_near(out, expected, 1e-5)
    assert not workspace[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("kind", FORMATS[1:])
def test_the_norm_before_and_the_residual_after_a_linear_are_fused(kind: str, tiles: int, dtype: torch.dtype) -> None:
    weight = weight_of(kind, 40, 96)
    streams = weight.streams
    hidden = to_streams(3 * random(1, 96, seed=1, dtype=dtype) + 0.5, streams)
    gain, shift = (to_streams(random(96, seed=seed, dtype=dtype), streams) for seed in (2, 3))
    residual, bias = random(1, 40, seed=4, dtype=dtype), random(40, seed=5, dtype=dtype)
    results = []
    for module in (launch, plain):
        out, kept = poisoned(1, 1, 40, dtype=dtype), poisoned(96, dtype=dtype)
        options = {} if module is plain else {"tile": (4, 32, 2, tiles)}
        module.linear(
            hidden, weight, out, norm=FusedNorm(gain, shift, 1e-5, kept), bias=bias, out_streams=8,
            residual=to_streams(residual, 4), residual_streams=4, residual_scale=7.5, **options,
        )  # fmt: skip
        results.append((out, kept))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, BOUNDS[dtype])
    assert launch.fuses(weight, 1) and not launch.fuses(weight, 2)


def test_long_rows_and_floats_take_no_norm_along() -> None:
    assert not launch.fuses(weight_of("float", 4, 64), 1)
    assert not launch.fuses(weight_of("int4", 4, 8192), 1)
    partial, tickets = launch.workspace([weight_of("int4", 6, 8192), weight_of("float", 4, 64)])
    assert partial.shape == (12,) and not tickets.any()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", FORMATS)
def test_bias_and_gelu_are_fused_and_written_in_stream_order(kind: str, tokens: int) -> None:
    weight = weight_of(kind, 40, 64)
    hidden = to_streams(random(tokens, 64, dtype=torch.float16, seed=1) / 8, weight.streams)
    bias = random(40, dtype=torch.float16, seed=2)
    out, expected = (poisoned(1, tokens, 40, dtype=torch.float16) for _ in "ab")
    launch.linear(hidden, weight, out, bias=bias, use_gelu=True, out_streams=8)
    plain.linear(hidden, weight, expected, bias=bias, use_gelu=True, out_streams=8)
    assert_near(out, expected, BOUNDS[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "splits"), [(2, 1), (5, 2), (16, 4), (33, 1)])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_few_tokens_through_a_linear(kind: str, tokens: int, splits: int, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter has no bf16 numbers of its own; a CUDA device runs this")
    weight = weight_of(kind, 70, 320, dtype)
    hidden = to_streams(random(tokens, 320, dtype=dtype, seed=1), weight.streams)
    out, expected = poisoned(splits, tokens, 70), poisoned(splits, tokens, 70)
    launch.linear(hidden, weight, out)
    plain.linear(hidden, weight, expected)
    assert_near(out.sum(dim=0), expected.sum(dim=0), BOUNDS[dtype])


@pytest.mark.parametrize("tile", [(32, 16, 4, 2), (64, 64, 4, 2), (16, 32, 1, 3)])
@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("int4", 64), ("int8", 64), ("int4-row", 0), ("float", 0)])
def test_tile_sizes_of_a_few_tokens_change_nothing(kind: str, group: int, tile: tuple[int, int, int, int]) -> None:
    weight = weight_of(kind, 40, 384, group=group)
    hidden = to_streams(random(3, 384, dtype=torch.float16, seed=1), weight.streams)
    out, expected = poisoned(2, 3, 40), poisoned(2, 3, 40)
    launch.linear(hidden, weight, out, tile=tile)
    plain.linear(hidden, weight, expected)
    assert_near(out.sum(dim=0), expected.sum(dim=0), 1e-3)


@pytest.mark.parametrize("streams", [1, 8])
@pytest.mark.parametrize("hidden", [48, 64])
@pytest.mark.parametrize("splits", [1, 3])
def test_norm_sums_shares_adds_bias_and_residual_and_normalises(splits: int, hidden: int, streams: int) -> None:
    parts, bias = random(splits, 5, hidden), random(hidden, seed=1)
    residual = to_streams(random(5, hidden, seed=2), streams)
    norm_weight, norm_bias = random(hidden, seed=3), random(hidden, seed=4)
    results = []
    for module in (launch, plain):
        kept, out = poisoned(5, hidden), poisoned(5, hidden)
        module.norm(
            parts, norm_weight, norm_bias, 1e-5, out, bias=bias, residual=residual, residual_streams=streams,
            residual_scale=7.5, kept=kept, streams=streams,
        )  # fmt: skip
        bare = poisoned(5, hidden)
        module.norm(parts, norm_weight, norm_bias, 1e-5, bare)
        results.append((kept, out, bare))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, 1e-5)


def table_of(kind: str) -> PackedWeight:
    bits = 8 if "8" in kind else 4
    module: nn.Module
    if kind == "float":
        module = nn.Embedding(11, 64)
    elif kind.endswith("row"):
        module = RowQuantizedEmbedding(11, 64, bits)
    else:
        module = GroupQuantizedEmbedding(11, 64, bits, 16)
    if kind != "float":
        module.quantize_(torch.randn(11, 64, generator=generator(0)))
    packed = PackedWeight.of(module.to(DEVICE))
    assert packed is not None
    return packed


@pytest.mark.parametrize(("rotary_streams", "streams"), [(1, 1), (2, 8)])
@pytest.mark.parametrize("kind", FORMATS)
def test_embeddings_and_rotations_of_a_step(kind: str, rotary_streams: int, streams: int) -> None:
    table = table_of(kind)
    ids = torch.tensor([3, 0, 10], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([9, 1500, 2], dtype=torch.int32, device=DEVICE)
    base = torch.tensor([[4, 700, 0], [-3, -900, 0]], dtype=torch.int32, device=DEVICE)
    step = torch.tensor([[0, 0, 1], [1, 1, 0]], dtype=torch.int32, device=DEVICE)
    frequencies = 10_000 ** -(torch.arange(6, device=DEVICE) / 6)
    results = []
    for module in (launch, plain):
        made = poisoned(3, 64), poisoned(3, 6 * rotary_streams), poisoned(3, 6 * rotary_streams)
        module.embed(ids, table, lengths, base, step, frequencies, 1, *made, streams=streams)
        results.append(made)
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, 1e-5)
    assert_near(results[0][1][1, :6], (700 * frequencies).cos(), 1e-5)


def attention_inputs(lengths: list[int], heads: int, head_dim: int, splits: int, dtype: torch.dtype) -> dict:
    """Random caches with poisoned spare slots, and tables of slots in no order."""
    batch, slots = len(lengths), sum(lengths) + 16
    keys, values = random(slots, heads, head_dim, dtype=dtype), random(slots, heads, head_dim, dtype=dtype, seed=1)
    order = torch.randperm(slots, generator=generator(2))
    tables = torch.zeros(batch, max(lengths) + 3, dtype=torch.int32)
    used = 0
    for row, length in enumerate(lengths):
        tables[row, :length] = order[used : used + length].int()
        used += length
    for cache in (keys, values):
        cache[order[used:].to(DEVICE)] = torch.nan
        cache[tables[torch.arange(batch), torch.tensor(lengths) - 1].long().to(DEVICE)] = torch.nan  # not written yet
    angles = random(batch, head_dim // 2, seed=3)
    return {
        "parts": random(splits, batch, 3 * heads * head_dim, seed=4),
        "bias": random(3 * heads * head_dim, seed=5, dtype=dtype),
        "cosines": angles.cos(),
        "sines": angles.sin(),
        "keys": keys,
        "values": values,
        "tables": tables.to(DEVICE),
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
    }


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), (3, 12)])
@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("per_head", [True, False])
def test_decode_attention(per_head: bool, pieces: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths = [1, 2, 16, 17, 70]
    results = []
    for module in (launch, plain):
        inputs = attention_inputs(lengths, heads, head_dim, 2, dtype)
        tickets = torch.zeros(len(lengths), heads, dtype=torch.int32, device=DEVICE)
        workspace = poisoned(len(lengths), heads, pieces, head_dim + 2), tickets
        out = poisoned(len(lengths), heads * head_dim, dtype=dtype)
        options = {} if module is plain else {"tile": (16, 4)}
        module.decode_attention(
            *inputs.values(), workspace, out, rotary_streams=2, per_head=per_head, pieces=pieces, streams=4, **options
        )
        assert not tickets.any()
        written = inputs["tables"][torch.arange(len(lengths)), torch.tensor(lengths) - 1].long()
        results.append((out, inputs["keys"][written], inputs["values"][written]))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, BOUNDS[dtype])


@pytest.mark.parametrize("has_no_piece", [True, False])
def test_best_tokens_are_finite_scores_of_rows_with_a_piece(has_no_piece: bool) -> None:
    logits = random(4, 5000)
    logits[1, 4321] = torch.nan
    logits[2, 7] = torch.inf
    no_piece = None
    if has_no_piece:
        no_piece = torch.zeros(5000, dtype=torch.int8, device=DEVICE)
        no_piece[logits[0].argmax()] = 1
    results = []
    for module in (launch, plain):
        chunks = -(-5000 // launch.CHUNK)
        workspace = (
            poisoned(4, chunks),
            *(torch.full((4, chunks), -1, dtype=torch.int32, device=DEVICE) for _ in "ab"),
        )
        ids = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
        lengths = torch.tensor([5, 6, 7, 8], dtype=torch.int32, device=DEVICE)
        chosen = torch.full((2, 4), -1, dtype=torch.int32, device=DEVICE)
        module.best_tokens(logits, no_piece, workspace, ids, lengths, chosen)
        results.append((ids, lengths, chosen))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    assert results[0][2][1].tolist() == [1, 0, 0, 1]
    assert (results[0][0][0] == logits[0].argmax()) is not has_no_piece or not has_no_piece


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize(("heads", "head_dim", "rotary_streams"), [(2, 16, 2), (3, 12, 2), (3, 12, 1)])
def test_heads_of_many_tokens_are_turned_and_cached(
    heads: int, head_dim: int, rotary_streams: int, per_head: bool
) -> None:
    qkv, angles = random(7, 3 * heads * head_dim), random(7, head_dim // 2, seed=1)
    slots = torch.randperm(9, generator=generator(2))[:7].to(DEVICE)
    results = []
    for module in (launch, plain):
        keys, values = poisoned(9, heads, head_dim), poisoned(9, heads, head_dim)
        out = poisoned(3, 7, heads, head_dim)
        module.split_heads(
            qkv, angles.cos(), angles.sin(), keys, values, slots, out, rotary_streams=rotary_streams, per_head=per_head
        )
        results.append((out, keys[slots], values[slots]))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_gelu_in_place(dtype: torch.dtype) -> None:
    inner = random(3, 1000, dtype=dtype) * 4
    expected = inner.clone()
    launch.gelu_(inner)
    plain.gelu_(expected)
    assert_near(inner, expected, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", FORMATS[1:])
def test_expanding_a_weight_is_exact(kind: str, dtype: torch.dtype) -> None:
    weight = weight_of(kind, 7, 96)
    out = poisoned(7, 96, dtype=dtype)
    launch.dequantize(weight, out)
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        assert_near(out, weight.dense(dtype), 2**-7)  # Triton's interpreter cuts where it should round
    else:
        assert torch.equal(out, weight.dense(dtype))
