"""The quantised linear and embedding as modules of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from chatglm.quantization import RowQuantizedEmbedding, RowQuantizedLinear
from golden_vectors import Case, assert_close, cases

PACK = [case for case in cases("packing", "pack") if "x" in case.inputs]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def linear_of(case: Case) -> RowQuantizedLinear:
    rows, columns = case.inputs["weight"].shape
    linear = RowQuantizedLinear(columns, rows, case.raw["bits"])
    linear.weight, linear.weight_scale = case.outputs["packed"], case.outputs["scale"]
    linear.bias = nn.Parameter(case.inputs["bias"], requires_grad=False)
    return linear


def random_linear(bits: int = 4, *, bias: bool = True) -> RowQuantizedLinear:
    torch.manual_seed(bits)
    linear = RowQuantizedLinear(16, 6, bits, bias=bias)
    linear.quantize_(torch.randn(6, 16))
    if linear.bias is not None:
        linear.bias.copy_(torch.randn(6))
    return linear


@pytest.mark.parametrize("case", PACK, ids=lambda case: case.id)
def test_the_linear_answers_as_the_original(case: Case) -> None:
    assert_close(linear_of(case)(case.inputs["x"]), case.outputs["linear_fp32"], 1e-6)
    if case.outputs["linear_fp16"].isfinite().all():
        # fp16 sums in another order: a few roundings of the largest partial sum
        assert_close(linear_of(case)(case.inputs["x"].half()), case.outputs["linear_fp16"], 4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_casting_the_model_leaves_codes_and_scales_alone(bits: int, dtype: torch.dtype) -> None:
    linear = random_linear(bits)
    weight, scale, bias = linear.weight.clone(), linear.weight_scale.clone(), linear.bias
    assert nn.Sequential(linear).to(dtype)[0] is linear
    assert torch.equal(linear.weight, weight) and torch.equal(linear.weight_scale, scale)
    assert linear.weight_scale.dtype == torch.float16
    assert bias is not None and linear.bias is not None and linear.bias.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_linear_computes_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    linear = random_linear().bfloat16()
    x = torch.randn(2, 3, 16)
    assert linear(x.to(dtype)).dtype == dtype
    expected = x.double() @ linear.dequantize(torch.float64).T + linear.bias.double()  # type: ignore[union-attr]
    bound = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert_close(linear(x.to(dtype)), expected.float(), bound)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_reach_the_input_as_through_a_plain_linear(bits: int, bias: bool) -> None:
    linear = random_linear(bits, bias=bias)
    x = torch.randn(3, 16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    linear(x).square().sum().backward()
    plain = nn.functional.linear(y, linear.dequantize(torch.float32), linear.bias)
    plain.square().sum().backward()
    assert x.grad is not None and y.grad is not None
    assert_close(x.grad, y.grad, 1e-6)


def test_the_backward_pass_keeps_no_expanded_weight() -> None:
    linear = random_linear()
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.shape) or saved, lambda saved: saved):
        linear(torch.randn(3, 16, requires_grad=True))
    assert torch.Size([6, 8]) in kept and torch.Size([6, 16]) not in kept


def test_no_weight_of_the_linear_is_trained() -> None:
    linear = random_linear()
    assert [name for name, parameter in linear.named_parameters() if parameter.requires_grad] == []
    assert list(linear.state_dict()) == ["bias", "weight", "weight_scale"]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_embedding_gives_the_rows_of_the_dequantised_table(bits: int) -> None:
    embedding = RowQuantizedEmbedding(11, 6, bits)
    embedding.quantize_(torch.randn(11, 6))
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    assert torch.equal(embedding(ids), embedding.dequantize(torch.float32)[ids])
    assert "dtype_like" not in embedding.state_dict()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_embedding_follows_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    embedding = RowQuantizedEmbedding(11, 6, 8)
    embedding.quantize_(torch.randn(11, 6))
    assert embedding.to(dtype)(torch.tensor([4])).dtype == dtype


def test_the_embedding_never_expands_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from chatglm.quantization import modules

    embedding = RowQuantizedEmbedding(1000, 6, 4)
    expanded: list[int] = []
    inner = modules.dequantize_rows

    def spy(packed: torch.Tensor, *rest: object) -> torch.Tensor:
        expanded.append(packed.numel())
        return inner(packed, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(modules, "dequantize_rows", spy)
    embedding(torch.tensor([[5, 6]]))
    assert expanded == [6]  # two rows of three bytes


def test_a_tied_head_shares_the_table_after_moves_casts_and_copies() -> None:
    model = nn.Module()
    model.embedding = RowQuantizedEmbedding(11, 6, 4)
    model.embedding.quantize_(torch.randn(11, 6))
    model.head = RowQuantizedLinear(6, 11, 4, bias=False)
    model.head.tie(model.embedding)
    for changed in (model, model.half(), copy.deepcopy(model), model.to("meta"), model.to_empty(device="cpu")):
        head, embedding = changed.head, changed.embedding
        assert head.weight is embedding.weight and head.weight_scale is embedding.weight_scale
        assert list(head.children()) == []


def test_modules_describe_themselves() -> None:
    assert "in_features=16, out_features=6, bits=4" in repr(random_linear())
    assert "11, 6, bits=8" in repr(RowQuantizedEmbedding(11, 6, 8))
