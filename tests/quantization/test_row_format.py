"""The arithmetic of the original INT8 and INT4, against what the original wrote."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from chatglm.errors import QuantizationError
from chatglm.quantization import dequantize_rows, pack_int4, quantize_rows, unpack_int4
from golden_vectors import Case, assert_close, cases

PACK, UNPACK = cases("packing", "pack"), cases("packing", "unpack")


def bound_rows(case: Case) -> list[int]:
    """Rows whose codes bind: a row of zeros is undefined in the original."""
    return [row for row in range(case.inputs["weight"].shape[0]) if row not in case.raw.get("zero_rows", [])]


@pytest.mark.parametrize("case", PACK, ids=lambda case: case.id)
def test_codes_and_scales_equal_the_originals_bit_for_bit(case: Case) -> None:
    packed, scale = quantize_rows(case.inputs["weight"], case.raw["bits"])
    rows = bound_rows(case)
    assert packed.dtype == torch.int8 and scale.dtype == torch.float16
    assert torch.equal(packed[rows], case.outputs["packed"][rows])
    assert torch.equal(scale, case.outputs["scale"])


@pytest.mark.parametrize("case", PACK, ids=lambda case: case.id)
def test_dequantised_values_equal_the_originals_in_both_dtypes(case: Case) -> None:
    packed, scale, bits = case.outputs["packed"], case.outputs["scale"], case.raw["bits"]
    assert torch.equal(dequantize_rows(packed, scale, bits, torch.float32), case.outputs["dequant_fp32"])
    assert torch.equal(dequantize_rows(packed, scale, bits, torch.float16), case.outputs["dequant_fp16"])


@pytest.mark.parametrize("case", [case for case in PACK if case.raw["bits"] == 4], ids=lambda case: case.id)
def test_int4_bytes_hold_the_even_column_in_the_high_half(case: Case) -> None:
    rows = bound_rows(case)
    assert torch.equal(unpack_int4(case.outputs["packed"])[rows], case.outputs["codes"][rows])
    assert torch.equal(pack_int4(case.outputs["codes"])[rows], case.outputs["packed"][rows])


@pytest.mark.parametrize("case", UNPACK, ids=lambda case: case.id)
def test_every_byte_unpacks_as_in_the_original(case: Case) -> None:
    values = dequantize_rows(case.inputs["packed"], case.inputs["scale"], case.raw["bits"], torch.float32)
    assert torch.equal(values, case.outputs["dequant_fp32"])


@pytest.mark.parametrize("case", [case for case in PACK if "x" in case.inputs], ids=lambda case: case.id)
def test_the_product_equals_the_originals(case: Case) -> None:
    values = dequantize_rows(case.outputs["packed"], case.outputs["scale"], case.raw["bits"], torch.float32)
    assert_close(functional.linear(case.inputs["x"], values, case.inputs["bias"]), case.outputs["linear_fp32"], 1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_row_of_zeros_has_scale_zero_and_codes_zero(bits: int, dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 0.5, 0.0], [1e-9, 0.0, 0.0, -1e-9]]).to(dtype)
    packed, scale = quantize_rows(weight, bits)
    assert scale[0] == 0 and not packed[0].any()
    assert scale[2] == 0 and not packed[2].any()  # below the smallest fp16 scale
    assert not dequantize_rows(packed, scale, bits, torch.float32)[[0, 2]].any()


@pytest.mark.parametrize(("bits", "limit"), [(8, 127), (4, 7)])
def test_a_subnormal_scale_never_lets_a_code_overflow(bits: int, limit: int) -> None:
    """Every fp16 row maximum up to 1e-3: the original wraps codes of up to 190 there."""
    largest = torch.arange(1, 0x1419, dtype=torch.int16).view(torch.float16)
    assert largest[-1] > 9.7e-4
    packed, scale = quantize_rows(torch.stack((largest, -largest), dim=1), bits)
    codes = (unpack_int4(packed) if bits == 4 else packed).int()
    assert codes.abs().max() <= limit
    assert torch.equal(codes[:, 0], -codes[:, 1]) and (codes[scale > 0, 0] > 0).all()
    values = dequantize_rows(packed, scale, bits, torch.float32)
    assert ((values[:, 0] - largest.float()).abs() <= scale.float() / 2 + limit * 2.0**-25).all()


@given(
    rows=st.integers(1, 5),
    pairs=st.integers(1, 9),
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
    magnitude=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
)
@settings(max_examples=80, deadline=None)
def test_quantising_loses_at_most_half_a_step(
    rows: int, pairs: int, bits: int, dtype: torch.dtype, seed: int, magnitude: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, 2 * pairs, generator=draw) * magnitude).to(dtype)
    packed, scale = quantize_rows(weight, bits)
    values = dequantize_rows(packed, scale, bits, torch.float32)
    half_a_step = 0.5 + 127 * 2.0**-11  # in fp16 the quotient is rounded to 11 bits first
    assert ((values - weight.float()).abs() <= scale.float()[:, None] * half_a_step + 127 * 2.0**-25).all()


@given(codes=st.lists(st.integers(-8, 7), min_size=2, max_size=40).filter(lambda codes: len(codes) % 2 == 0))
def test_packing_is_undone_by_unpacking(codes: list[int]) -> None:
    tensor = torch.tensor([codes], dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(tensor)), tensor)


def test_bf16_values_are_rounded_once() -> None:
    packed, scale = torch.tensor([[127, 101, -127]], dtype=torch.int8), torch.tensor([0.0123], dtype=torch.float16)
    exact = packed.double() * scale.double()
    assert torch.equal(dequantize_rows(packed, scale, 8, torch.bfloat16), exact.to(torch.bfloat16))


def test_odd_columns_are_refused_in_int4_only() -> None:
    with pytest.raises(QuantizationError, match="7 columns") as refused:
        quantize_rows(torch.ones(3, 7), 4)
    assert refused.value.cure == "use INT8"
    assert quantize_rows(torch.ones(3, 7), 8)[0].shape == (3, 7)


@pytest.mark.parametrize(
    ("weight", "bits", "message"),
    [
        (torch.ones(2, 2), 3, "3 bits"),
        (torch.ones(4), 8, "only a floating matrix"),
        (torch.ones(2, 2, dtype=torch.int8), 8, "only a floating matrix"),
        (torch.tensor([[1.0, 1.0], [float("nan"), 1.0]]), 8, "row 1 .* nan"),
        (torch.tensor([[1.0, float("-inf")]]), 4, "row 0 .* inf"),
        (torch.tensor([[1e9, 1.0]]), 8, "row 0 has the largest magnitude 1000000000.0"),
    ],
)
def test_what_cannot_be_quantised_is_refused_with_its_numbers(weight: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize_rows(weight, bits)
