"""Names and shapes by arithmetic, compared with the network itself and with the release's own table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from chatglm.checkpoint import cache_bytes, estimate_memory, expected_tensors, weight_bytes
from chatglm.checkpoint.layout import cut, original_names, original_shards
from chatglm.checkpoint.releases import known_sizes
from chatglm.config import ModelConfig
from chatglm.model import GLM
from chatglm.quantization import swap_as_described
from checkpoint_folders import SMALL

VARIANTS = {
    "plain": SMALL,
    "untied": replace(SMALL, tied_head=False),
    "glm": replace(SMALL, position_encoding="learned_2d", norm_order="pre", residual_scale=1.0, qkv_layout="block"),
    "glm-130b": replace(SMALL, position_encoding="rotary_1d", mlp="geglu"),
    "prefix": replace(SMALL, pre_seq_len=5),
    "projection": replace(SMALL, pre_seq_len=5, prefix_projection=True),
    "int8": replace(SMALL, quantization_bit=8),
    "int4": replace(SMALL, quantization_bit=4),
    "int4-qe": replace(SMALL, quantization_bit=4, quantization_embeddings=True),
    "int8-groups": SMALL.quantized(8),
    "int4-groups": SMALL.quantized(4),
    "int4-groups-untied": replace(SMALL, tied_head=False).quantized(4, 8, 4),
    "int4-groups-float-tables": SMALL.quantized(4, 16, 0),
}

PRE_SLIM = ModelConfig(
    vocab_size=150_528,
    bos_token_id=150_004,
    eos_token_id=150_005,
    mask_token_id=150_000,
    gmask_token_id=150_001,
    pad_token_id=20_003,
)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_expected_tensors_are_those_of_the_network(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = swap_as_described(GLM(config.quantized(0)), config)
    assert model.config == config
    specs = expected_tensors(config)
    state = model.state_dict()
    assert specs.keys() == state.keys()
    for name, tensor in state.items():
        assert specs[name].shape == tuple(tensor.shape), name
        assert specs[name].is_codes == (not tensor.is_floating_point()), name
        assert not specs[name].is_codes or specs[name].kinds == (str(tensor.dtype).removeprefix("torch."),), name
        assert specs[name].is_optional == (config.tied_head and name.startswith("lm_head")), name


def test_chatglm_6b_has_its_parameters() -> None:
    specs = expected_tensors(ModelConfig())
    assert sum(spec.elements for spec in specs.values() if not spec.is_optional) == 6_173_286_400
    assert sum(spec.elements for spec in specs.values()) == 6_707_929_088


@pytest.mark.parametrize("config", [ModelConfig(), PRE_SLIM], ids=["slim", "pre-slim"])
def test_the_shards_are_cut_as_the_release_was(config: ModelConfig) -> None:
    shards, stated = original_shards(config)
    assert [len(names) for names in shards] == [25, 63, 61, 63, 60, 63, 32, 1]
    assert stated == 13_744_473_856
    layers = "transformer.layers."
    assert shards[0][-1] == f"{layers}1.mlp.dense_h_to_4h.bias" and shards[7] == ["lm_head.weight"]
    assert shards[1][0] == f"{layers}1.mlp.dense_4h_to_h.weight"
    assert shards[1][-1] == f"{layers}6.post_attention_layernorm.bias"
    assert shards[2][-3:] == [f"{layers}11.attention.{rest}" for rest in _QKV]
    assert shards[3][-1] == f"{layers}16.attention.rotary_emb.inv_freq"
    assert shards[4][-1] == f"{layers}20.mlp.dense_h_to_4h.bias"
    assert shards[5][-1] == f"{layers}25.post_attention_layernorm.bias"
    assert shards[6][-1] == "transformer.final_layernorm.bias"


_QKV = ("rotary_emb.inv_freq", "query_key_value.weight", "query_key_value.bias")


@pytest.mark.parametrize("config", [ModelConfig(), PRE_SLIM], ids=["slim", "pre-slim"])
def test_the_sizes_of_the_release_are_its_tensors_and_some_hundred_bytes_each(config: ModelConfig) -> None:
    names = original_names(config)
    shards, _ = original_shards(config)
    for held, size in zip(shards, known_sizes(config).values(), strict=True):
        elements = [(names[name].elements, 4 if "layernorm" in name else 2) for name in held]
        overhead = size - sum(count * item for count, item in elements)
        assert 200 * len(held) < overhead < 800 * len(held)


def test_a_small_model_is_cut_in_proportion() -> None:
    shards, _ = original_shards(replace(SMALL, num_layers=6, hidden_size=64, inner_hidden_size=256))
    assert len(shards) > 1
    assert [name for held in shards for name in held] == list(original_names(replace(SMALL, num_layers=6)))


def test_a_cut_keeps_order_and_size() -> None:
    assert cut([("a", 3), ("b", 3), ("c", 9), ("d", 1), ("e", 4)], 6) == [["a", "b"], ["c"], ["d", "e"]]


def test_sizes_are_known_for_the_released_model_only() -> None:
    assert known_sizes(ModelConfig())["pytorch_model-00008-of-00008.bin"] == 1_069_286_123
    assert known_sizes(PRE_SLIM)["pytorch_model-00001-of-00008.bin"] == 1_904_491_802
    for other in (None, SMALL, ModelConfig(num_layers=27), ModelConfig(quantization_bit=4), ModelConfig(pre_seq_len=8)):
        assert known_sizes(other) == {}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("fp32", 24_693_145_600),
        ("fp16", 12_346_572_800),
        ("bf16", 12_346_572_800),
        # groups of 64 with fp16 scales, embedding and head INT8 in both; biases and norms fp16 (2,998,272 bytes)
        ("int8", (5_637_144_576 + 534_642_688) * 66 // 64 + 2_998_272),
        ("int4", 5_637_144_576 * 34 // 64 + 534_642_688 * 66 // 64 + 2_998_272),
    ],
)
def test_the_memory_of_chatglm_6b_by_arithmetic(dtype: str, expected: int) -> None:
    config = ModelConfig()
    assert weight_bytes(config, dtype) == expected
    assert cache_bytes(config, dtype, 1) == (917_504 if dtype == "fp32" else 458_752)
    assert estimate_memory(config, dtype) == expected + cache_bytes(config, dtype, 2_048)
    assert estimate_memory(config, dtype, tokens=10) == expected + 10 * cache_bytes(config, dtype, 1)


def test_a_checkpoint_that_is_stored_so_counts_its_own_form() -> None:
    """The original's INT4 with a float embedding, and with a quantised one; as INT8 both would become the own form."""
    plain = replace(ModelConfig(), quantization_bit=4)
    # weights 1/2 byte; scales, biases, embedding and norms fp16 (spec/chatglm-6b.md §6.5, norms fp32 there)
    assert weight_bytes(plain, "int4") == 5_637_144_576 // 2 + 4_128_768 + 1_069_285_376 + 933_888
    with_tables = replace(plain, quantization_embeddings=True)
    saved = weight_bytes(plain, "int4") - weight_bytes(with_tables, "int4")
    assert saved == 534_642_688 * 3 // 2 - 130_528 * 2
    assert weight_bytes(plain, "int8") == weight_bytes(ModelConfig(), "int8")


def test_an_unknown_dtype_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="fp8"):
        weight_bytes(SMALL, "fp8")
