"""Old checkpoints into today's form."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from chatglm.checkpoint import convert, convert_ptuning, load_into, open_checkpoint, verify
from chatglm.checkpoint.reading import read_tensor
from chatglm.config import read_config
from chatglm.errors import CheckpointError
from chatglm.model import GLM
from chatglm.model.positions import find_layout, positions, prefix_blocked
from checkpoint_folders import MODELS, edit_tensors, first_release, golden_copy
from golden_vectors import GOLDEN, assert_close, cases, tensors_of

SLIM_SHA256 = "5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e"
FIRST_SHA256 = "99871e0c85db81ad7af1028854fd091cd5778c8414ae9d94bbbc10d02c831c21"


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in open_checkpoint(folder).tensors.items()}


@pytest.mark.parametrize(
    "name", ["base-fp16", "base-fp32", "oned-fp32", "int8", "int4", "int4-qe", "ptuning-projection"]
)
def test_every_form_becomes_safetensors_with_equal_tensors(tmp_path: Path, name: str) -> None:
    target = convert(golden_copy(name, tmp_path), tmp_path / "new")
    assert verify(target, deep=True) == []
    assert [path.name for path in target.glob("*.bin")] == []
    stored = {key: tensor for key, tensor in tensors_of(name).items() if not key.startswith("lm_head")}
    converted = state(target)
    assert converted.keys() == stored.keys()
    assert all(converted[key].dtype == stored[key].dtype and torch.equal(converted[key], stored[key]) for key in stored)
    assert read_config(target / "config.json") == read_config(MODELS / name / "config.json")


def test_back_to_the_original_layout_the_head_is_stored_again(tmp_path: Path) -> None:
    target = convert(golden_copy("int4-qe", tmp_path), tmp_path / "new", format="original")
    read = torch.load(target / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors_of("int4-qe").items())
    safetensors = convert(target, tmp_path / "safetensors")
    again = convert(safetensors, tmp_path / "again", format="original")
    assert torch.load(again / "pytorch_model.bin", weights_only=True).keys() == read.keys()


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_floats_take_the_asked_dtype_and_codes_with_their_scales_stay(
    tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    target = convert(golden_copy("int8", tmp_path), tmp_path / "new", dtype=dtype)
    stored = tensors_of("int8")
    for name, tensor in state(target).items():
        is_kept = name.endswith("_scale") or stored[name].dtype == torch.int8
        assert tensor.dtype == (stored[name].dtype if is_kept else expected), name
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name


def test_a_pre_slim_checkpoint_becomes_slim_with_equal_logits(tmp_path: Path) -> None:
    target = convert(MODELS / "preslim-full-vocab", tmp_path / "slim", to_slim=True)
    case = cases("preslim-full-vocab", "forward_preslim")[0]
    checkpoint = open_checkpoint(target)
    assert checkpoint.config.vocab_size == 130_528
    model = GLM(checkpoint.config)
    load_into(model, checkpoint, dtype=torch.float32)
    ids = case.inputs["input_ids"] - 20_000
    layout = find_layout(ids, model.config)
    logits = model(ids, positions(layout, ids.shape[1], model.config), prefix_blocked(layout, ids.shape[1]))
    assert_close(logits[0, :, ::499], case.outputs["v110_slim.logits_every_499th"])


def test_its_tokenizer_files_become_those_of_the_slim_release_byte_for_byte(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    source = golden_copy("preslim-full-vocab", tmp_path)
    first = first_release(tokenizer_file.read_bytes())
    assert hashlib.sha256(first).hexdigest() == FIRST_SHA256
    (source / "ice_text.model").write_bytes(first)
    assert verify(source) == []
    target = convert(source, tmp_path / "slim", to_slim=True)
    assert verify(target, deep=True) == []
    assert hashlib.sha256((target / "ice_text.model").read_bytes()).hexdigest() == SLIM_SHA256
    released = json.loads((GOLDEN / "models" / "slim-full-vocab" / "tokenizer_config.json").read_text())
    released.pop("auto_map")
    assert json.loads((target / "tokenizer_config.json").read_text()) == released


def test_as_it_is_a_pre_slim_checkpoint_keeps_its_era_and_tokenizer(tmp_path: Path, tokenizer_file: Path) -> None:
    source = golden_copy("preslim-full-vocab", tmp_path)
    (source / "ice_text.model").write_bytes(first_release(tokenizer_file.read_bytes()))
    target = convert(source, tmp_path / "new")
    assert verify(target) == []
    assert (target / "ice_text.model").read_bytes() == (source / "ice_text.model").read_bytes()
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config["eop_token"] == "<eop>" and "num_image_tokens" not in config
    assert open_checkpoint(target).config.era == "pre-slim"


def test_a_later_tokenizer_file_beside_pre_slim_weights_stays(tmp_path: Path, tokenizer_file: Path) -> None:
    source = golden_copy("preslim-full-vocab", tmp_path)
    shutil.copy(tokenizer_file, source / "ice_text.model")
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"num_image_tokens": 20_000}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    assert verify(source) == []
    target = convert(source, tmp_path / "slim", to_slim=True)
    assert verify(target) == [] and (target / "ice_text.model").read_bytes() == tokenizer_file.read_bytes()


def test_to_slim_changes_nothing_where_nothing_is_to_do(tmp_path: Path) -> None:
    target = convert(golden_copy("base-fp16", tmp_path), tmp_path / "new", to_slim=True)
    assert state(target)["transformer.word_embeddings.weight"].shape == (552, 32)
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<eop>" and config["num_image_tokens"] == 0


def test_no_python_file_and_no_pointer_to_one_comes_along_but_the_licence_does(tmp_path: Path) -> None:
    source = golden_copy("base-fp16", tmp_path)
    (source / "modeling_chatglm.py").write_text("raise SystemExit")
    (source / "MODEL_LICENSE").write_text("terms")
    target = convert(source, tmp_path / "new")
    assert not list(target.glob("*.py")) and (target / "MODEL_LICENSE").read_text() == "terms"
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((target / name).read_text())


@pytest.mark.parametrize("name", ["ptuning", "ptuning-projection"])
def test_a_tuned_prefix_and_its_base_become_one_checkpoint(tmp_path: Path, name: str) -> None:
    base = golden_copy(name, tmp_path)
    edit_tensors(
        base / "pytorch_model.bin",
        lambda tensors: [tensors.pop(key) for key in list(tensors) if "prefix_encoder" in key],
    )
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("pre")}))
    target = convert_ptuning(MODELS / f"{name}-prefix-only", base, tmp_path / "merged")
    assert verify(target, deep=True) == []
    expected = {key: tensor for key, tensor in tensors_of(name).items() if not key.startswith("lm_head")}
    merged = state(target)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key].float(), expected[key].float()) for key in expected)
    assert open_checkpoint(target).config == read_config(MODELS / name / "config.json")


def test_a_head_that_differs_is_not_dropped_silently(tmp_path: Path) -> None:
    source = golden_copy("ptuning", tmp_path)
    edit_tensors(
        source / "pytorch_model.bin", lambda tensors: tensors.update({"lm_head.weight": torch.ones(552, 32).half()})
    )
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dtype": "int3"}, "'int3' is no dtype"), ({"format": "gguf"}, "'gguf' is no format")],
)
def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(MODELS / "base-fp16", tmp_path / "new", **arguments)  # type: ignore[arg-type]


def test_a_folder_is_not_converted_into_itself(tmp_path: Path) -> None:
    source = golden_copy("base-fp16", tmp_path)
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(source, tmp_path / "base-fp16" / ".." / "base-fp16", overwrite=True)


def test_a_broken_source_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = golden_copy("base-fp32", tmp_path)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_old_target_is_replaced_when_asked(tmp_path: Path) -> None:
    target = convert(MODELS / "base-fp16", tmp_path / "new")
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        convert(MODELS / "oned-fp32", target)
    convert(MODELS / "oned-fp32", target, overwrite=True)
    assert open_checkpoint(target).config == read_config(MODELS / "oned-fp32" / "config.json")
