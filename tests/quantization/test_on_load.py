"""Weights that change their format while a checkpoint is loaded: against the whole model quantised at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chatglm.checkpoint import load_into, open_checkpoint, random_checkpoint, save, verify
from chatglm.config import ModelConfig, read_config
from chatglm.engine.loading import load_model, wanted_form
from chatglm.errors import ConfigError, QuantizationError
from chatglm.model import GLM
from chatglm.quantization import convert_on_load, dequantize_model, swap_as_described, swap_linears
from checkpoint_folders import MODELS, SMALL, golden_copy, small_safetensors
from golden_vectors import plain_model

FORMS = {
    "fp32": SMALL,
    "int8-rows": SMALL.quantized(8, 0, 0),
    "int4-rows-qe": SMALL.quantized(4, 0, 4),
    "int8-groups": SMALL.quantized(8),
    "int4-groups": SMALL.quantized(4),
    "int4-groups-all": SMALL.quantized(4, 8, 4),
    "int4-groups-float-tables": SMALL.quantized(4, 8, 0),
}


def empty(config: ModelConfig) -> GLM:
    with torch.device("meta"):
        return swap_as_described(GLM(config.quantized(0)), config)


def stored(config: ModelConfig, to: Path) -> Path:
    """A folder in this form, made by swapping a real model."""
    torch.manual_seed(1)
    model = swap_as_described(GLM(config.quantized(0)), config)
    return save(to, model.state_dict(), config)


@pytest.mark.parametrize("wanted", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("source", FORMS.values(), ids=FORMS)
def test_loading_into_another_form_is_expanding_and_quantising_the_whole(
    source: ModelConfig, wanted: ModelConfig, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(stored(source, tmp_path / "model"))
    model = empty(wanted)
    load_into(model, checkpoint, dtype=torch.float32, transform=convert_on_load(source, wanted))
    expected = empty(source)
    load_into(expected, checkpoint, dtype=torch.float32)
    if source != wanted:
        dequantize_model(expected, torch.float32)
        swap_as_described(expected, wanted)
    assert model.config == expected.config == wanted
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert state["lm_head.weight"].data_ptr() == state["transformer.word_embeddings.weight"].data_ptr()


def test_the_same_form_needs_no_transform() -> None:
    assert convert_on_load(SMALL.quantized(4), SMALL.quantized(4)) is None
    assert convert_on_load(SMALL, SMALL) is None
    assert convert_on_load(SMALL.quantized(4, 8, 4), SMALL.quantized(4, 8, 8)) is not None


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_saved_forms_are_fit_to_load_and_come_back_bit_for_bit(form: ModelConfig, tmp_path: Path) -> None:
    folder = stored(form, tmp_path / "model")
    assert verify(folder, deep=True, tokenizer=False) == []
    assert read_config(folder / "config.json") == form
    model = empty(form)
    load_into(model, open_checkpoint(folder), dtype=torch.bfloat16)
    torch.manual_seed(1)
    for name, tensor in swap_as_described(GLM(SMALL), form).state_dict().items():
        loaded = model.state_dict()[name]
        is_float = tensor.is_floating_point() and not name.endswith("_scale")
        assert torch.equal(loaded, tensor.bfloat16() if is_float else tensor), name


def test_a_group_size_that_the_scales_contradict_is_found_before_loading(tmp_path: Path) -> None:
    folder = stored(SMALL.quantized(4, 8, 8), tmp_path / "model")
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(
        text.replace('"quantization_group_size": 8', '"quantization_group_size": 16'), encoding="utf-8"
    )
    (problem,) = verify(folder, tokenizer=False)
    assert "word_embeddings.weight_scale [552, 2] float16 (and 8 more)" in str(problem)
    assert "asks for [552, 1]" in str(problem) and "check quantization_bit and quantization_group_size" in str(problem)


@pytest.mark.parametrize("layout", ["safetensors", "original"])
def test_random_group_checkpoints_are_whole_and_their_layers_matter(layout: str, tmp_path: Path) -> None:
    config = SMALL.quantized(4)
    folder = random_checkpoint(tmp_path / "model", config, layout=layout)  # type: ignore[arg-type]
    assert verify(folder, deep=True, tokenizer=False) == []
    model = empty(config)
    load_into(model, open_checkpoint(folder), dtype=torch.float32)
    plain = dequantize_model(model, torch.float32)
    for name, weight in plain.named_parameters():
        if weight.ndim == 2 and "layers" in name:
            assert 0.5 < weight.std() * weight.shape[1] ** 0.5 < 5, name


class TestWhatLoadingMakesOfADtype:
    """wanted_form and load_model: which form the weights of a folder get."""

    def test_int4_from_floats_is_the_own_form_with_embeddings_in_int8(self, tmp_path: Path) -> None:
        loaded = load_model(small_safetensors(tmp_path / "model"), "int4", "cpu")
        assert loaded.config == SMALL.quantized(4)
        assert (loaded.config.quantization_group_size, loaded.config.embedding_bits) == (16, 8)
        assert loaded.model.lm_head.weight is loaded.model.transformer.word_embeddings.weight
        assert loaded.weights == "int4"

    def test_stored_bits_keep_their_own_packing(self, tmp_path: Path) -> None:
        config = load_model(golden_copy("int4-qe", tmp_path), "int4", "cpu").config
        assert (config.quantization_bit, config.quantization_group_size, config.embedding_bits) == (4, 0, 4)
        assert config == read_config(MODELS / "int4-qe" / "config.json")

    def test_other_bits_become_the_own_form(self, tmp_path: Path) -> None:
        config = load_model(golden_copy("int8", tmp_path), "int4", "cpu").config
        assert (config.quantization_bit, config.quantization_group_size) == (4, 32)

    def test_a_small_quantised_model_is_expanded_unless_asked_otherwise(self) -> None:
        small, large = SMALL.quantized(4), ModelConfig().quantized(4)
        assert wanted_form(small, "auto") == SMALL
        assert wanted_form(small, "int4") == small
        assert wanted_form(large, "auto") == large
        assert wanted_form(large, "fp16") == ModelConfig()
        assert wanted_form(ModelConfig(), "auto") == ModelConfig()


def test_the_default_group_size_is_the_largest_that_divides_every_matrix() -> None:
    assert ModelConfig().quantized(4).quantization_group_size == 64
    assert SMALL.quantized(8).quantization_group_size == 16
    assert ModelConfig(hidden_size=24, num_heads=2, inner_hidden_size=48).quantized(4).quantization_group_size == 8
    odd = ModelConfig(hidden_size=36, num_heads=9, inner_hidden_size=72)
    assert odd.quantized(4).quantization_group_size == 0  # row-wise
    with pytest.raises(ConfigError, match="`quantization_group_size` 64 does not divide `hidden_size` 16"):
        SMALL.quantized(4, 64)


def test_embeddings_may_have_other_bits_than_the_linears() -> None:
    model = swap_linears(plain_model("base-fp32"), 4, True, group_size=16, embedding_bits=8)
    assert (model.transformer.word_embeddings.bits, model.lm_head.bits) == (8, 8)
    assert model.transformer.layers[0].attention.dense.bits == 4
    assert model.config.quantization_embedding_bit == 8
    with pytest.raises(QuantizationError, match="3 bits"):
        swap_linears(plain_model("base-fp32"), 4, True, embedding_bits=3)
