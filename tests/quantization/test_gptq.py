"""GPTQ against the formula it is derived from, and against plain rounding."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from chatglm.errors import QuantizationError
from chatglm.quantization import dequantize_groups, quantize_groups
from chatglm.quantization.gptq import DAMPING, gptq
from chatglm.quantization.group_format import unpack_pairs


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix and the Hessian of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    return weight, inputs.T @ inputs / len(inputs)


def output_error(weight: Tensor, packed: Tensor, scale: Tensor, hessian: Tensor, bits: int = 4) -> float:
    difference = dequantize_groups(packed, scale, bits, torch.float32) - weight
    return float((difference @ hessian * difference).sum())


def by_elimination(weight: Tensor, hessian: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """The same choice without Cholesky factors: after each column its row and column leave the inverse (OBS)."""
    columns = weight.shape[1]
    damped = hessian.double() + DAMPING * hessian.diagonal().mean().double() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    left, codes = weight.double().clone(), torch.zeros_like(weight)
    for column in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        scale = scales[:, column // group_size].double()
        codes[:, column] = (left[:, column] / scale).round().clamp(-8, 7)
        error = (left[:, column] - codes[:, column] * scale) / inverse[column, column]
        left -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("seed", range(4))
def test_codes_are_those_of_the_elimination_they_stand_for(seed: int) -> None:
    weight, hessian = problem(12, 64, seed)
    packed, scales = gptq(weight, hessian, 4, 16)
    expected = by_elimination(weight, hessian, scales, 16)
    assert (unpack_pairs(packed) != expected).float().mean() < 0.005  # fp32 against fp64 at a rounding border


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(64, 96, 32), (8, 300, 20), (1, 512, 64), (40, 264, 8)])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_output_is_closer_than_with_plain_rounding(rows: int, columns: int, group_size: int, bits: int) -> None:
    if group_size % 8:
        group_size, columns = 24, 312  # blocks of 128 columns end inside a group
    weight, hessian = problem(rows, columns, seed=columns)
    made = output_error(weight, *gptq(weight, hessian, bits, group_size), hessian, bits)
    plain = output_error(weight, *quantize_groups(weight, bits, group_size), hessian, bits)
    assert made < 0.8 * plain


def test_inputs_that_do_not_depend_on_each_other_leave_plain_rounding() -> None:
    weight, _ = problem(16, 64, 0)
    made = gptq(weight, torch.diag(torch.rand(64) + 0.1), 4, 32)
    for found, expected in zip(made, quantize_groups(weight, 4, 32), strict=True):
        assert torch.equal(found, expected)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), columns=st.sampled_from([8, 40, 136]), bits=st.sampled_from([4, 8]))
def test_storage_is_that_of_the_group_format(seed: int, columns: int, bits: int) -> None:
    weight, hessian = problem(5, columns, seed)
    packed, scales = gptq(weight, hessian, bits, 8)
    plain, plain_scales = quantize_groups(weight, bits, 8)
    assert (packed.dtype, packed.shape) == (plain.dtype, plain.shape)
    assert torch.equal(scales, plain_scales) and torch.isfinite(scales).all()
    assert bits == 4 or packed.abs().max() <= 127


def test_columns_that_no_input_reaches_and_zero_groups_are_no_trouble() -> None:
    weight, hessian = problem(6, 64, 3)
    hessian[:, 5] = hessian[5] = 0
    weight[:, 16:32] = 0
    packed, scales = gptq(weight, hessian, 4, 16)
    back = dequantize_groups(packed, scales, 4, torch.float32)
    assert torch.isfinite(back).all() and (back[:, 16:32] == 0).all()
    step = scales[:, 0].float().abs()
    assert ((back[:, 5] - weight[:, 5]).abs() <= 0.5 * step + 1e-6).all()  # nothing pushes it away


def test_no_input_at_all_is_plain_rounding() -> None:
    weight, _ = problem(6, 32, 4)
    for found, expected in zip(gptq(weight, torch.zeros(32, 32), 4, 32), quantize_groups(weight, 4, 32), strict=True):
        assert torch.equal(found, expected)


def test_neither_argument_is_changed() -> None:
    weight, hessian = problem(6, 32, 5)
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, 4, 8)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_inputs_that_are_not_finite_are_an_error_that_says_so() -> None:
    weight, hessian = problem(6, 32, 6)
    hessian[3, 3] = torch.nan
    with pytest.raises(QuantizationError, match="inputs are not finite"):
        gptq(weight, hessian, 4, 8)
