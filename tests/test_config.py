"""ModelConfig: three eras, foreign keys, impossible values."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest

from chatglm.config import CHATGLM_RESIDUAL_SCALE, ModelConfig, from_original, read_config, to_original
from chatglm.errors import ConfigError

SLIM = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "num_attention_heads": 32,
    "num_layers": 28,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 130528,
}
PRE_SLIM = {
    key: value for key, value in SLIM.items() if key not in ("mask_token_id", "gmask_token_id", "pad_token_id")
} | {"bos_token_id": 150004, "eos_token_id": 150005, "vocab_size": 150528}


def test_released_config_is_the_default_description():
    assert from_original(SLIM) == ModelConfig()


def test_pre_slim_config_lacks_ids_that_the_code_knew():
    config = from_original(PRE_SLIM)
    assert (config.mask_token_id, config.gmask_token_id, config.pad_token_id) == (150000, 150001, 20003)
    assert config.era == "pre-slim" and config.image_tokens == 20000
    assert config.num_parameters == 6_255_206_400


def test_slimming_a_pre_slim_config_gives_the_slim_one():
    assert from_original(PRE_SLIM).slim() == ModelConfig()
    assert ModelConfig().slim() == ModelConfig()


def test_absent_keys_mean_the_first_release():
    assert from_original({"model_type": "chatglm"}) == from_original(PRE_SLIM)


def test_parameter_counts_of_the_family():
    assert ModelConfig().num_parameters == 6_173_286_400
    glm_130b = ModelConfig(
        vocab_size=150_528,
        hidden_size=12_288,
        num_layers=70,
        num_heads=96,
        inner_hidden_size=32_768,
        position_encoding="rotary_1d",
        mlp="geglu",
    )
    assert glm_130b.num_parameters == 128_697_794_560
    glm_10b = ModelConfig(
        vocab_size=50_304,
        num_layers=48,
        num_heads=64,
        max_sequence_length=1_024,
        position_encoding="learned_2d",
        norm_order="pre",
        qkv_layout="block",
        bos_token_id=50_257,
        eos_token_id=50_258,
        mask_token_id=50_260,
        gmask_token_id=50_263,
        pad_token_id=50_256,
    )
    assert glm_10b.num_parameters == 9_880_682_496
    assert replace(ModelConfig(), tied_head=False).num_parameters == 6_707_929_088


@pytest.mark.parametrize(
    "config", [ModelConfig(), from_original(PRE_SLIM), ModelConfig(pre_seq_len=8, prefix_projection=True)]
)
def test_written_config_reads_back_equal_without_warnings(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_original(json.loads(json.dumps(to_original(config)))) == config


def test_own_switches_survive_the_round_trip():
    config = ModelConfig(
        position_encoding="rotary_1d", mlp="geglu", residual_scale=2.0, tied_head=False, answer_positions="running"
    )
    assert from_original(to_original(config)) == config


def test_residual_scale_does_not_follow_the_depth():
    assert (
        from_original(SLIM | {"num_layers": 2}).residual_scale
        == CHATGLM_RESIDUAL_SCALE
        == pytest.approx(7.483314773547883)
    )


def test_unknown_key_is_one_warning_with_the_nearest_name():
    with pytest.warns(UserWarning, match="`num_layer` is ignored; did you mean `num_layers`"):
        from_original(SLIM | {"num_layer": 3})


@pytest.mark.parametrize(
    ("key", "value"),
    [("multi_query_attention", True), ("rmsnorm", True), ("padded_vocab_size", 65024), ("rope_ratio", 2)],
)
def test_keys_of_later_generations_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"`{key}` is {value}"):
        from_original(SLIM | {key: value})


def test_foreign_key_with_the_value_of_this_architecture_is_accepted():
    assert from_original(SLIM | {"rmsnorm": False, "multi_query_attention": False}) == ModelConfig()


def test_other_model_type_is_refused_with_its_name():
    with pytest.raises(ConfigError, match="model_type is 'llama'"):
        from_original(SLIM | {"model_type": "llama"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 4095}, "hidden_size 4095 is not a multiple of num_heads 32"),
        ({"num_layers": 0}, "`num_layers` is 0"),
        ({"num_layers": "28"}, "`num_layers` is '28'"),
        ({"num_layers": True}, "`num_layers` is True"),
        ({"hidden_size": 96, "num_attention_heads": 48}, "head size 2"),
        ({"bos_token_id": 130528}, "`bos_token_id` is 130528, outside the 130528 rows"),
        ({"gmask_token_id": 130000}, "special ids must differ"),
        ({"layernorm_epsilon": 0}, "`layernorm_epsilon` is 0"),
        ({"quantization_bit": 3}, "`quantization_bit` is 3; allowed: 0, 4, 8"),
        ({"pre_seq_len": 0}, "`pre_seq_len` is 0"),
    ],
)
def test_impossible_values_are_refused_with_the_value(change, message):
    with pytest.raises(ConfigError, match="config.json: .*" + message):
        from_original(SLIM | change)


def test_wrong_type_is_an_error_not_a_traceback():
    with pytest.raises(ConfigError, match=r"config\.json"):
        from_original(SLIM | {"layernorm_epsilon": "small"})


def test_newer_name_of_the_dtype_key_is_read():
    raw = {key: value for key, value in SLIM.items() if key != "torch_dtype"}
    assert from_original(raw | {"dtype": "bfloat16"}).torch_dtype == "bfloat16"


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="no such file"):
        read_config(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        read_config(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="a JSON list"):
        read_config(path)
    path.write_text(json.dumps(SLIM), encoding="utf-8")
    assert read_config(path) == ModelConfig()
