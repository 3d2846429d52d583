"""The CPU linears against dequantise-then-multiply, on every instruction set that this machine has."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

pytest.importorskip("llvmlite")

from chatglm.kernels.cpu import kernel_kit, worker_threads
from chatglm.kernels.cpu.formats import Layout, Matrix, Tile
from chatglm.kernels.cpu.jit import host_targets
from chatglm.kernels.cpu.workers import Operation, Program
from chatglm.quantization import dequantize_groups, dequantize_rows, quantize_groups, quantize_rows

TARGETS = [target.name for target in host_targets()]

SAME_CODES = 1e-5
"""Bound of the relative error against the same rounded activations: fp32 sums in another order."""

ROUNDING = 1.5e-2
"""Bound of what rounding activations to INT8 loses: 2.6 σ / 127 / √12 is 0.6%, more where groups are few."""

FORMS = [(4, 128), (4, 64), (4, 32), (4, 8), (4, 0), (8, 128), (8, 32), (8, 0)]
SHAPES = [(37, 256), (64, 384), (5, 128), (97, 512)]


def quantised(rows: int, columns: int, bits: int, group: int) -> tuple[Matrix, Tensor, Tensor, Tensor]:
    """The matrix, its codes and scales, and its values in fp64."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns + bits + group))
    if group:
        packed, scale = quantize_groups(weight, bits, group)
        values = dequantize_groups(packed, scale, bits, torch.float32)
    else:
        packed, scale = quantize_rows(weight, bits)
        values = dequantize_rows(packed, scale, bits, torch.float32)
    return Matrix(columns, bits, group, is_original=bits == 4 and not group), packed, scale, values.double()


def run(*operations: tuple[int, int, tuple[Tensor | int, ...]]) -> None:
    """Each operation: kernel, chunks, fields."""
    made = []
    for kernel, chunks, fields in operations:
        words = [field.data_ptr() if isinstance(field, Tensor) else field for field in fields]
        made.append(Operation(kernel, numpy.array(words, dtype=numpy.int64), chunks))
    worker_threads(2).run(Program(made, operations))


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def few(
    target: str, matrix: Matrix, packed: Tensor, scale: Tensor, bias: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """The output, and the activations that were multiplied."""
    kit, tokens = kernel_kit(target), hidden.shape[0]
    layout = Layout.of(kit.target, matrix)
    codes = torch.full((tokens, layout.padded_columns), 99, dtype=torch.int8)
    scales, corrections = poisoned(tokens, layout.groups), poisoned(tokens, layout.groups)
    out = poisoned(tokens, bias.shape[0])
    rows, rows_a_chunk = bias.shape[0], 16
    run(
        (kit.quantize_tokens(layout, 1, False), tokens, (hidden, codes, scales, corrections)),
        (
            kit.linear_few(matrix, tokens),
            -(-rows // rows_a_chunk),
            (packed, scale, bias, codes, scales, corrections, out, rows, rows_a_chunk),
        ),
    )
    columns = codes.unflatten(1, (-1, layout.halves, layout.block // layout.halves)).transpose(2, 3).flatten(1)
    groups = layout.padded_columns // layout.group
    rounded = columns.unflatten(1, (groups, -1)) * scales[:, :groups, None]
    return out, rounded.flatten(1)[:, : matrix.columns]


def many(
    target: str, matrix: Matrix, packed: Tensor, scale: Tensor, bias: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """The output, and the activations that were multiplied."""
    kit, tokens, rows = kernel_kit(target), hidden.shape[0], bias.shape[0]
    tile = Tile.of(kit.target, matrix)
    tiles = -(-tokens // tile.tokens)
    codes = torch.full((tiles, tile.padded_columns // tile.quad, tile.halves, tile.tokens, 4), 99, dtype=torch.int8)
    starts = torch.full((tiles, tile.groups, tile.tokens), 99, dtype=torch.int32)
    scales, out = poisoned(tiles, tile.groups, tile.tokens), poisoned(tokens, rows)
    run(
        (kit.quantize_tiles(tile, False), tiles, (hidden, codes, starts, scales, tokens)),
        (
            kit.linear_many(matrix),
            -(-rows // tile.rows),
            (packed, scale, bias, codes, starts, scales, out, rows, tokens),
        ),
    )
    columns = codes.permute(0, 3, 1, 4, 2).reshape(tiles * tile.tokens, tile.groups, tile.group)
    rounded = columns * scales.transpose(1, 2).flatten(0, 1)[..., None]
    return out, rounded.flatten(1)[:tokens, : matrix.columns]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("bits", "group"), FORMS)
@pytest.mark.parametrize(("form", "tokens"), [(few, 1), (few, 2), (few, 4), (many, 3), (many, 12), (many, 29)])
def test_a_linear_equals_dequantise_then_multiply(target: str, bits: int, group: int, form, tokens: int) -> None:
    for rows, columns in SHAPES:
        matrix, packed, scale, values = quantised(rows, columns, bits, group)
        generator = torch.Generator().manual_seed(tokens)
        hidden = torch.randn(tokens, columns, generator=generator)
        bias = torch.randn(rows, generator=generator)
        out, rounded = form(target, matrix, packed, scale, bias, hidden)
        assert error(out, rounded.double() @ values.T + bias) < SAME_CODES
        assert error(out, hidden.double() @ values.T + bias) < ROUNDING


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("columns", "bits", "group"), [(72, 4, 0), (40, 4, 8), (200, 8, 8), (96, 4, 32), (104, 8, 0)])
@pytest.mark.parametrize(("form", "tokens"), [(few, 1), (many, 5)])
def test_columns_that_fill_no_register_read_nothing_behind_the_matrix(
    target: str, columns: int, bits: int, group: int, form, tokens: int
) -> None:
    matrix, packed, scale, values = quantised(19, columns, bits, group)
    hidden, bias = torch.randn(tokens, columns), torch.zeros(19)
    guarded = at_the_end_of_a_page(packed)
    out, rounded = form(target, matrix, guarded, scale, bias, hidden)
    assert error(out, rounded.double() @ values.T) < SAME_CODES


def at_the_end_of_a_page(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last before memory that may not be read."""
    import ctypes
    import mmap

    pages = -(-tensor.numel() // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    protect = ctypes.CDLL(None).mprotect
    array = numpy.frombuffer(memory, dtype=numpy.uint8)
    last = array.ctypes.data + (pages - 1) * mmap.PAGESIZE
    assert protect(ctypes.c_void_p(last), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    start = (pages - 1) * mmap.PAGESIZE - tensor.numel()
    copy = torch.from_numpy(array[start : start + tensor.numel()]).view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy


@pytest.mark.parametrize("form", [few, many])
def test_a_value_that_is_not_finite_poisons_its_own_token_alone(form) -> None:
    matrix, packed, scale, values = quantised(33, 256, 4, 64)
    for bad in (torch.nan, torch.inf):
        hidden = torch.randn(4, 256)
        hidden[1, 100] = bad
        out, _ = form(TARGETS[0], matrix, packed, scale, torch.zeros(33), hidden)
        assert bool(out[1].isnan().all())
        others = [0, 2, 3]
        assert error(out[others], hidden[others].double() @ values.T) < ROUNDING


def test_activations_of_zero_give_the_bias() -> None:
    matrix, packed, scale, _ = quantised(33, 256, 4, 64)
    bias = torch.randn(33)
    for form in (few, many):
        out, _ = form(TARGETS[0], matrix, packed, scale, bias, torch.zeros(2, 256))
        assert torch.equal(out, bias.expand(2, 33))


def test_a_token_alone_and_among_others_gives_the_same_bits() -> None:
    matrix, packed, scale, _ = quantised(64, 384, 4, 32)
    hidden, bias = torch.randn(4, 384), torch.randn(64)
    together, _ = few(TARGETS[0], matrix, packed, scale, bias, hidden)
    for token in range(4):
        alone, _ = few(TARGETS[0], matrix, packed, scale, bias, hidden[token : token + 1])
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 256), (3, 200), (9, 40), (4, 512)])
def test_a_linear_of_floats_equals_the_product(target: str, dtype: torch.dtype, tokens: int, columns: int) -> None:
    rows, kit = 45, kernel_kit(target)
    weight, bias = torch.randn(rows, columns).to(dtype), torch.randn(rows)
    hidden, out = torch.randn(tokens, columns), poisoned(tokens, rows)
    kernel = kit.linear_floats(columns, str(dtype).removeprefix("torch."))
    run((kernel, 3, (weight, bias, hidden, out, rows, 16, tokens)))
    assert error(out, hidden.double() @ weight.double().T + bias) < SAME_CODES
    for token in range(tokens):
        alone = poisoned(1, rows)
        run((kernel, 3, (weight, bias, hidden[token : token + 1].contiguous(), alone, rows, 16, 1)))
        assert torch.equal(alone[0], out[token]), "the result depends on the batch"
