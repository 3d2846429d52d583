"""The project's own group-wise INT4 and INT8."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm.errors import QuantizationError
from chatglm.quantization import (
    GroupQuantizedEmbedding,
    GroupQuantizedLinear,
    dequantize_groups,
    dequantize_model,
    quantize_groups,
    quantize_on_load,
    swap_linears,
)
from chatglm.quantization.group_format import pack_pairs, unpack_pairs
from golden_vectors import assert_close, plain_model


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_a_byte_holds_the_even_column_in_its_low_half_offset_by_eight() -> None:
    codes = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    assert pack_pairs(codes).tolist() == [[0 | 15 << 4, 8 | 7 << 4]]


@given(st.lists(st.lists(st.integers(-8, 7), min_size=6, max_size=6), min_size=1, max_size=4))
def test_unpacking_gives_back_every_code(rows: list[list[int]]) -> None:
    codes = torch.tensor(rows, dtype=torch.int8)
    assert torch.equal(unpack_pairs(pack_pairs(codes)), codes)


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.uint8), (8, torch.int8)])
def test_shapes_and_dtypes_are_those_of_the_documented_layout(bits: int, dtype: torch.dtype) -> None:
    packed, scale = quantize_groups(random_weight(3, 64), bits, 32)
    assert packed.dtype == dtype and packed.shape == (3, 64 * bits // 8)
    assert scale.dtype == torch.float16 and scale.shape == (3, 2)


@settings(max_examples=40)
@given(st.integers(0, 1000), st.sampled_from([4, 8]), st.sampled_from([8, 16, 24]), st.booleans())
def test_every_weight_is_within_half_a_step_or_clipped(seed: int, bits: int, group_size: int, search: bool) -> None:
    weight = random_weight(5, 48, seed)
    packed, scale = quantize_groups(weight, bits, group_size, search=search)
    restored = dequantize_groups(packed, scale, bits, torch.float32)
    step = scale.float().abs().repeat_interleave(group_size, dim=1)
    reach = step * (127 if bits == 8 else 7)  # beyond it a weight may be clipped
    error = (restored - weight).abs()
    # fp16 scales are off by up to 2^-11 of themselves, times the largest code
    assert (error <= step * (0.5 + 2**-11 * 127) + (weight.abs() - reach).clamp(min=0)).all()


def test_the_search_never_makes_the_squared_error_larger_and_helps() -> None:
    weight = random_weight(64, 256)
    errors = []
    for search in (False, True):
        packed, scale = quantize_groups(weight, 4, 64, search=search)
        difference = (dequantize_groups(packed, scale, 4, torch.float32) - weight).unflatten(1, (-1, 64))
        errors.append(difference.square().sum(dim=-1))
    assert (errors[1] <= errors[0]).all() and errors[1].sum() < 0.95 * errors[0].sum()


def test_the_signed_extreme_is_kept_exactly_without_the_search() -> None:
    weight = torch.tensor([[0.5, -1.0, 0.25, 0.0, 0.125, 0.1, 0.2, 0.3], [0.5, 2.0, 0.25, 0, 0.5, 0.1, 0.2, 0.3]])
    packed, scale = quantize_groups(weight, 4, 8, search=False)
    assert scale.flatten().tolist() == [0.125, -0.25]
    restored = dequantize_groups(packed, scale, 4, torch.float32)
    assert restored[0, 1] == -1.0 and restored[1, 1] == 2.0


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_of_zeros_stays_zero(bits: int) -> None:
    weight = random_weight(2, 32)
    weight[0, :16] = 0
    packed, scale = quantize_groups(weight, bits, 16)
    assert scale[0, 0] == 0
    assert (dequantize_groups(packed, scale, bits, torch.float32)[0, :16] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_long_matrices_are_quantised_in_parts_with_the_same_result(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatglm.quantization import group_format

    weight = random_weight(10, 32)
    whole = quantize_groups(weight, bits, 16)
    monkeypatch.setattr(group_format, "CHUNK_ELEMENTS", 96)
    parts = quantize_groups(weight, bits, 16)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_half_precisions_round_once(dtype: torch.dtype) -> None:
    packed, scale = quantize_groups(random_weight(4, 64), 4, 32)
    exact = dequantize_groups(packed, scale, 4, torch.float64)
    assert torch.equal(dequantize_groups(packed, scale, 4, dtype), exact.to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_value_without_a_scale_is_named_by_row_and_group(bits: int, bad: float) -> None:
    weight = random_weight(4, 32)
    weight[2, 20] = bad
    with pytest.raises(QuantizationError, match="row 2, group 1"):
        quantize_groups(weight, bits, 16)


@pytest.mark.parametrize("group_size", [0, 4, 12, 64])
def test_a_group_size_that_does_not_fit_is_refused(group_size: int) -> None:
    with pytest.raises(QuantizationError, match="group"):
        quantize_groups(random_weight(2, 32), 4, group_size)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_linear_is_the_product_with_the_dequantised_weight(bits: int) -> None:
    linear = GroupQuantizedLinear(64, 6, bits, 16)
    linear.quantize_(random_weight(6, 64))
    x = random_weight(5, 64, 1)
    expected = x @ linear.dequantize(torch.float32).T
    assert_close(linear(x), expected, 1e-6)
    leaf = x.clone().requires_grad_()
    linear(leaf).sum().backward()
    assert leaf.grad is not None
    assert_close(leaf.grad, linear.dequantize(torch.float32).sum(0).expand(5, -1), 1e-6)
    assert f"bits={bits}, group_size=16" in repr(linear)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_embedding_gives_the_rows_of_the_dequantised_table(bits: int) -> None:
    table = GroupQuantizedEmbedding(11, 32, bits, 16)
    table.quantize_(random_weight(11, 32))
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    assert torch.equal(table(ids), table.dequantize(torch.float32)[ids])
    assert table.half()(ids).dtype == torch.float16


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_is_swapped_and_expanded_again(bits: int) -> None:
    model = plain_model("base-fp16")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swap_linears(model, bits, embeddings=True, group_size=16)
    assert (model.config.quantization_bit, model.config.quantization_group_size) == (bits, 16)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    packed = model.state_dict()
    name = "transformer.layers.1.mlp.dense_4h_to_h.weight"
    assert all(
        torch.equal(a, b)
        for a, b in zip(quantize_groups(weights[name], bits, 16), (packed[name], packed[f"{name}_scale"]), strict=True)
    )
    dequantize_model(model, torch.float32)
    assert model.config.quantization_group_size == 0
    assert torch.equal(
        model.state_dict()[name], dequantize_groups(packed[name], packed[f"{name}_scale"], bits, torch.float32)
    )


def test_quantising_while_loading_equals_quantising_afterwards() -> None:
    model = plain_model("base-fp16")
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    transform = quantize_on_load(4, True, group_size=8)
    made = {new: tensor for name, tensor in plain.items() for new, tensor in transform(name, tensor)}
    expected = swap_linears(model, 4, True, group_size=8).state_dict()
    assert all(torch.equal(made[name], expected[name]) for name in made)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_wide_matrix_is_expanded_a_few_rows_at_a_time_to_the_same_numbers(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatglm.quantization import group_format

    weight = torch.randn(13, 64, generator=torch.Generator().manual_seed(4))
    packed, scale = quantize_groups(weight, bits, 16)
    at_once = dequantize_groups(packed, scale, bits, torch.bfloat16)
    monkeypatch.setattr(group_format, "WIDE_BYTES", 3 * packed.shape[1])
    assert torch.equal(dequantize_groups(packed, scale, bits, torch.bfloat16), at_once)
