"""A whole model into its quantised form and back; the original's quantised checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from chatglm.config import ModelConfig, read_config
from chatglm.errors import QuantizationError
from chatglm.model import GLM
from chatglm.model.positions import find_layout, generation_positions, positions, prefix_blocked
from chatglm.quantization import (
    RowQuantizedEmbedding,
    RowQuantizedLinear,
    dequantize_model,
    dequantize_rows,
    quantize_on_load,
    quantize_rows,
    swap_linears,
)
from golden_vectors import GOLDEN, Case, assert_close, cases, plain_model, tensors_of

CHECKPOINTS = ["int8", "int4", "int4-qe"]
SMALL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    inner_hidden_size=32,
    bos_token_id=34,
    eos_token_id=35,
    mask_token_id=30,
    gmask_token_id=31,
)


def quantised_model(name: str) -> GLM:
    """`models/<name>` loaded by hand into a swapped model."""
    config = read_config(GOLDEN / "models" / name / "config.json")
    model = swap_linears(GLM(config), config.quantization_bit, config.quantization_embeddings)
    missing, unexpected = model.load_state_dict(tensors_of(name), strict=False)
    assert not missing and not unexpected
    return model.eval()


def logits(model: GLM, ids: Tensor) -> Tensor:
    layout = find_layout(ids, model.config)
    return model(ids, positions(layout, ids.shape[1], model.config), prefix_blocked(layout, ids.shape[1]))


@torch.no_grad()
def greedy(model: GLM, ids: Tensor, max_length: int) -> list[list[int]]:
    while ids.shape[1] < max_length and int(ids[0, -1]) != model.config.eos_token_id:
        layout = find_layout(ids, model.config)
        places = generation_positions(layout, ids.shape[1], model.config)
        scores = model(ids, places, prefix_blocked(layout, ids.shape[1]))[:, -1]
        ids = torch.cat((ids, scores.argmax(dim=-1, keepdim=True)), dim=1)
    return ids.tolist()


def quantised_cases(kind: str) -> list[tuple[str, Case]]:
    return [(name, case) for name in CHECKPOINTS for case in cases(f"checkpoint-{name}", kind)]


@pytest.mark.parametrize(("name", "case"), quantised_cases("forward_quantised"), ids=lambda v: getattr(v, "id", v))
def test_logits_of_the_quantised_checkpoints_equal_the_originals(name: str, case: Case) -> None:
    assert_close(logits(quantised_model(name), case.inputs["input_ids"]), case.outputs["logits"])


@pytest.mark.parametrize(("name", "case"), quantised_cases("generate"), ids=lambda v: getattr(v, "id", v))
def test_greedy_ids_of_the_quantised_checkpoints_equal_the_originals(name: str, case: Case) -> None:
    made = greedy(quantised_model(name), case.inputs["input_ids"], case.raw["generate_kwargs"]["max_length"])
    assert made == case.outputs["ids"]


@pytest.mark.parametrize(("name", "case"), quantised_cases("forward_quantised"), ids=lambda v: getattr(v, "id", v))
def test_a_dequantised_checkpoint_has_the_same_logits_and_no_quantised_module(name: str, case: Case) -> None:
    model = dequantize_model(quantised_model(name), torch.float32)
    assert_close(logits(model, case.inputs["input_ids"]), case.outputs["logits"])
    assert not [module for module in model.modules() if isinstance(module, RowQuantizedLinear | RowQuantizedEmbedding)]
    assert model.config.quantization_bit == 0 and model.lm_head.weight is model.transformer.word_embeddings.weight
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_swapping_a_real_model_quantises_its_weights(bits: int, embeddings: bool) -> None:
    model = plain_model("base-fp16")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swap_linears(model, bits, embeddings)
    assert model.config.quantization_bit == bits and model.transformer.config is model.config
    names = [name for name in model.state_dict() if name.endswith("weight_scale")]
    assert len(names) == 4 * model.config.num_layers + 2 * embeddings
    for name in names:
        packed, scale = quantize_rows(weights[name.removesuffix("_scale")], bits)
        assert torch.equal(model.state_dict()[name], scale)
        assert torch.equal(model.state_dict()[name.removesuffix("_scale")], packed)
    untouched = [name for name in weights if f"{name}_scale" not in model.state_dict()]
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in untouched)


def test_a_tied_quantised_head_shares_the_embeddings_table() -> None:
    model = swap_linears(GLM(SMALL), 8, embeddings=True)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    model.tie_head()
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert isinstance(model.lm_head, RowQuantizedLinear) and model.lm_head.bias is None


def test_an_untied_head_is_quantised_from_its_own_weights() -> None:
    from dataclasses import replace

    model = GLM(replace(SMALL, tied_head=False))
    head = model.lm_head.weight.detach().clone()
    swap_linears(model, 8, embeddings=True)
    packed, scale = quantize_rows(head, 8)
    assert torch.equal(model.lm_head.weight, packed)
    dequantize_model(model, torch.float16)
    assert torch.equal(model.lm_head.weight, dequantize_rows(packed, scale, 8, torch.float16))
    assert model.lm_head.weight is not model.transformer.word_embeddings.weight


def test_a_meta_model_is_swapped_without_memory() -> None:
    with torch.device("meta"):
        model = swap_linears(GLM(SMALL), 4, embeddings=True)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert model.transformer.word_embeddings.weight.shape == (40, 8)
    assert model.transformer.layers[0].mlp.dense_4h_to_h.weight.shape == (16, 16)


def test_zero_bits_change_nothing() -> None:
    model = GLM(SMALL)
    assert swap_linears(model, 0) is model and model.config.quantization_bit == 0
    assert isinstance(model.transformer.layers[0].attention.dense, nn.Linear)


def test_quantising_twice_is_refused() -> None:
    model = swap_linears(GLM(SMALL), 8)
    with pytest.raises(QuantizationError, match="already quantised to INT8"):
        swap_linears(model, 4)


def test_a_weight_that_cannot_be_quantised_is_named() -> None:
    model = GLM(SMALL)
    with torch.no_grad():
        model.transformer.layers[1].mlp.dense_h_to_4h.weight[3, 0] = float("inf")
    with pytest.raises(QuantizationError, match=r"transformer\.layers\.1\.mlp\.dense_h_to_4h: row 3"):
        swap_linears(model, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_plain_model_is_only_cast(dtype: torch.dtype) -> None:
    model = dequantize_model(GLM(SMALL), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize("embeddings", [False, True])
def test_quantising_while_loading_equals_quantising_afterwards(embeddings: bool) -> None:
    model = GLM(SMALL)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    transform = quantize_on_load(4, embeddings)
    made = {new: tensor for name, tensor in plain.items() for new, tensor in transform(name, tensor)}
    expected = swap_linears(model, 4, embeddings).state_dict()
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)


def test_quantising_while_loading_names_the_tensor_that_cannot_be() -> None:
    name = "transformer.layers.0.attention.dense.weight"
    with pytest.raises(QuantizationError, match=f"{name}: row 0"):
        list(quantize_on_load(8)(name, torch.full((2, 2), float("nan"))))
