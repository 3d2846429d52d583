"""from_pretrained and save_pretrained: round trips, dtypes, tying, refusals before memory is spent, prefixes."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import chatglm.hf
from chatglm.checkpoint import open_checkpoint
from chatglm.engine.loading import load_model
from chatglm.errors import CheckpointError, ConfigError
from chatglm.model.positions import find_layout, positions, prefix_blocked
from chatglm.quantization.recipe import Recipe
from chatglm.quantization.writing import quantize_checkpoint
from golden_vectors import GOLDEN, assert_close, cases


def logits(model: Any, name: str = "base-fp32") -> Any:
    with torch.no_grad():
        return model(cases(name, "forward")[0].inputs["input_ids"]).logits


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSeq2SeqLM, AutoModelForCausalLM])
def test_every_auto_class_gives_the_language_model(auto: Any) -> None:
    model = auto.from_pretrained(str(GOLDEN / "models" / "base-fp32"), trust_remote_code=True)
    assert type(model) is chatglm.hf.ChatGLMForConditionalGeneration and not model.training


@pytest.mark.parametrize("name", ["base-fp32", "oned-fp32", "ptuning", "ptuning-projection", "int8", "int4", "int4-qe"])
def test_a_saved_model_is_the_same_under_the_original_names(name: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / name))
    model.save_pretrained(str(tmp_path))
    again = AutoModel.from_pretrained(str(tmp_path))
    found, expected = again.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    names = open_checkpoint(tmp_path).tensors
    assert "lm_head.weight" not in names and "transformer.word_embeddings.weight" in names
    case = cases(name if not name.startswith("int") else f"checkpoint-{name}")[0]
    assert_close(again.float()(case.inputs["input_ids"]).logits, case.outputs["logits"])
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert stored["model_type"] == "chatglm" and stored["num_layers"] == model.config.num_layers


def test_a_saved_model_in_several_shards_loads(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "base-fp32"))
    model.save_pretrained(str(tmp_path), max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModel.from_pretrained(str(tmp_path))), logits(model))


def test_the_checkpoints_dtype_is_kept_and_norms_stay_fp32() -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "base-fp16"))
    dtypes = {name: value.dtype for name, value in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "layernorm" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "layernorm" not in name} == {torch.float16}
    assert logits(model, "base-fp16" if cases("base-fp16", "forward") else "base-fp32").isfinite().all()
    assert {value.dtype for value in model.half().parameters()} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dtype_that_is_asked_for_is_given(dtype: torch.dtype) -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "base-fp16"), **{chatglm.hf.loading.DTYPE_KEY: dtype})
    dtypes = {value.dtype for name, value in model.named_parameters() if "layernorm" not in name}
    assert dtypes == {dtype}  # some versions of transformers keep the norms in fp32 beside bf16


def test_head_and_embedding_are_one_tensor_also_where_both_are_stored() -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "base-fp32"))
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    described = chatglm.hf.ChatGLMConfig.from_pretrained(str(GOLDEN / "models" / "base-fp32"))
    made = AutoModel.from_config(described)
    assert made.lm_head.weight is made.transformer.word_embeddings.weight
    quantised = AutoModel.from_pretrained(str(GOLDEN / "models" / "int4-qe"))
    assert quantised.lm_head.weight.data_ptr() == quantised.transformer.word_embeddings.weight.data_ptr()


def test_a_stored_head_that_differs_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "models" / "base-fp32", tmp_path / "d")
    for file in (tmp_path / "d").glob("*.bin"):
        state = torch.load(file, weights_only=True)
        if "lm_head.weight" in state:
            state["lm_head.weight"] = state["lm_head.weight"] + 1
            torch.save(state, file)
    with pytest.raises(CheckpointError, match="head that differs"):
        AutoModel.from_pretrained(str(tmp_path / "d"))


def test_an_untied_head_is_kept_and_trained_apart(tmp_path: Path) -> None:
    described = chatglm.hf.ChatGLMConfig.from_pretrained(
        str(GOLDEN / "models" / "base-fp32"), tie_word_embeddings=False
    )
    model = chatglm.hf.ChatGLMForConditionalGeneration(described)
    assert model.lm_head.weight is not model.transformer.word_embeddings.weight
    model.save_pretrained(str(tmp_path))
    again = AutoModel.from_pretrained(str(tmp_path))
    assert again.lm_head.weight is not again.transformer.word_embeddings.weight
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.parametrize("kind", ["pointer", "truncated", "missing"])
def test_a_damaged_folder_is_one_error_naming_the_file(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    shutil.copytree(GOLDEN / "models" / "base-fp32", folder)
    shard = folder / "pytorch_model-00002-of-00002.bin"
    if kind == "pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 302427\n")
    elif kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin"):
        AutoModel.from_pretrained(str(folder))


def test_weights_and_ids_of_two_eras_are_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "models" / "slim-full-vocab", tmp_path / "d")
    shutil.copy(GOLDEN / "models" / "preslim-full-vocab" / "config.json", tmp_path / "d")
    with pytest.raises(CheckpointError, match=r"pre-slim ids.*slim weights"):
        AutoModel.from_pretrained(str(tmp_path / "d"))


def test_a_later_generation_is_refused_by_name(tmp_path: Path) -> None:
    later = {"model_type": "chatglm", "multi_query_attention": True, "num_layers": 28, "padded_vocab_size": 65024}
    (tmp_path / "config.json").write_text(json.dumps(later))
    with pytest.raises(ConfigError, match="another architecture"):
        AutoConfig.from_pretrained(str(tmp_path), trust_remote_code=True)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Any:
    transformers.utils.logging.enable_propagation()
    yield caplog
    transformers.utils.logging.disable_propagation()


@pytest.mark.parametrize("projection", [False, True])
def test_a_new_prefix_is_started_and_that_is_said_once(projection: bool, log: Any) -> None:
    folder = str(GOLDEN / "models" / "base-fp32")
    model = AutoModel.from_pretrained(folder, pre_seq_len=7, prefix_projection=projection, trust_remote_code=True)
    said = [record.message for record in log.records if record.levelname == "WARNING"]
    assert len(said) == 1 and "a new P-tuning prefix of 7 tokens" in said[0]
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained and all(name.startswith("transformer.prefix_encoder.") for name in trained)
    table = model.transformer.prefix_encoder.embedding.weight
    assert table.dtype == torch.float32 and table.std().item() == pytest.approx(1, rel=0.2)
    output = model(cases("base-fp32", "forward")[0].inputs["input_ids"], use_cache=True)
    assert output.past_key_values[0][0].shape[0] == 17 and output.logits.isfinite().all()
    ids = cases("base-fp32", "forward")[0].inputs["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


def test_a_trained_prefix_loads_without_a_word(log: Any) -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "ptuning"))
    assert not [record for record in log.records if record.levelname == "WARNING"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "transformer.prefix_encoder.embedding.weight"
    }


def test_a_prefix_alone_is_refused_with_the_cure() -> None:
    with pytest.raises(CheckpointError, match="without the model it was trained on"):
        AutoModel.from_pretrained(str(GOLDEN / "models" / "ptuning-prefix-only"))


def test_the_bare_network_loads_under_its_own_name() -> None:
    folder = str(GOLDEN / "models" / "base-fp32")
    bare, whole = chatglm.hf.ChatGLMModel.from_pretrained(folder), AutoModel.from_pretrained(folder)
    ids = cases("base-fp32", "forward")[0].inputs["input_ids"]
    with torch.no_grad():
        assert_close(bare(ids).last_hidden_state, whole(ids, output_hidden_states=True).hidden_states[-1], 1e-6)


def test_a_model_from_a_config_alone_can_be_trained() -> None:
    described = chatglm.hf.ChatGLMConfig.from_pretrained(str(GOLDEN / "models" / "base-fp32"))
    model = AutoModel.from_config(described)
    ids = cases("base-fp32", "forward")[0].inputs["input_ids"]
    loss = model(ids, labels=ids).loss
    assert 3 < loss.item() < 12  # ln 552 is 6.3
    loss.backward()
    assert model.transformer.layers[0].attention.query_key_value.weight.grad.isfinite().all()


def test_the_embedding_can_be_resized() -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "base-fp32"))
    before = logits(model)
    options = inspect.signature(model.resize_token_embeddings).parameters
    model.resize_token_embeddings(560, **({"mean_resizing": False} if "mean_resizing" in options else {}))
    assert model.config.vocab_size == 560 and model.lm_head.weight is model.transformer.word_embeddings.weight
    assert_close(logits(model)[..., :552], before, 1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_projects_own_group_format_loads_and_saves(bits: int, small_folder: Path, tmp_path: Path) -> None:
    """Whatever chatglm.load reads, AutoModel reads: the same logits as the native network over the same folder."""
    quantize_checkpoint(small_folder, tmp_path / "groups", Recipe(bits, group_size=16))
    native = load_model(tmp_path / "groups", dtype="fp32", device="cpu").model
    case = cases("base-fp32", "forward")[0]
    ids = case.inputs["input_ids"]
    layout = find_layout(ids, native.config)
    places, blocked = positions(layout, ids.shape[1], native.config), prefix_blocked(layout, ids.shape[1])
    with torch.no_grad():
        expected = native(ids, places, blocked)
    model = AutoModel.from_pretrained(str(tmp_path / "groups")).float()
    assert_close(logits(model), expected)
    model.save_pretrained(str(tmp_path / "again"))
    assert_close(logits(AutoModel.from_pretrained(str(tmp_path / "again")).float()), expected)
