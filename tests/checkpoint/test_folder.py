"""Opening checkpoint folders: which files, which tensors, which era."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm.checkpoint import open_checkpoint
from chatglm.checkpoint.reading import read_tensor
from chatglm.errors import CheckpointError, ConfigError
from checkpoint_folders import MODELS, PREFIX_ONLY, WHOLE, edit_json, edit_tensors, golden_copy, small_safetensors

QKV = "transformer.layers.0.attention.query_key_value.weight"


@pytest.mark.parametrize("name", WHOLE)
def test_every_golden_checkpoint_opens_without_its_rotary_buffers(name: str) -> None:
    checkpoint = open_checkpoint(MODELS / name)
    assert not [tensor for tensor in checkpoint.tensors if "inv_freq" in tensor]
    assert checkpoint.nbytes == sum(checkpoint.dtypes.values()) > 0
    assert checkpoint.folder == MODELS / name and checkpoint.tokenizer_file is None
    assert not checkpoint.is_prefix_only


def test_shards_are_found_by_their_index() -> None:
    checkpoint = open_checkpoint(MODELS / "base-fp32")
    assert {path.name for path in checkpoint.files} == {
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    }


def test_shards_are_found_by_name_when_the_index_is_lost(tmp_path: Path) -> None:
    folder = golden_copy("base-fp32", tmp_path)
    (folder / "pytorch_model.bin.index.json").unlink()
    assert open_checkpoint(folder).tensors.keys() == open_checkpoint(MODELS / "base-fp32").tensors.keys()
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00001-of-00002\.bin is missing"):
        open_checkpoint(folder)


def test_safetensors_win_over_bin_files(tmp_path: Path) -> None:
    folder = small_safetensors(tmp_path / "model")
    torch.save({}, folder / "pytorch_model.bin")
    assert {path.name for path in open_checkpoint(folder).files} == {"model.safetensors"}


def test_sharded_safetensors_are_read(tmp_path: Path) -> None:
    folder = small_safetensors(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for k, held in enumerate((names[:5], names[5:])):
        file = f"model-0000{k + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in held}, folder / file)
        where |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.files) == 2
    assert all(torch.equal(read_tensor(checkpoint.tensors[name]), tensor) for name, tensor in tensors.items())


def test_the_index_decides_which_of_two_copies_counts(tmp_path: Path) -> None:
    folder = golden_copy("base-fp32", tmp_path)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())["weight_map"]
    other = next(name for name in set(index.values()) if name != index[QKV])
    edit_tensors(folder / other, lambda tensors: tensors.update({QKV: torch.zeros(144, 48)}))
    assert open_checkpoint(folder).tensors[QKV].file.name == index[QKV]


def test_the_stale_total_size_of_an_index_is_ignored(tmp_path: Path) -> None:
    folder = golden_copy("base-fp32", tmp_path)
    edit_json(folder / "pytorch_model.bin.index.json", metadata={"total_size": 13_744_473_856})
    assert open_checkpoint(folder).nbytes == open_checkpoint(MODELS / "base-fp32").nbytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is not a readable index"),
        ("[1]", "is not a readable index"),
        ('{"weight_map": [1]}', "is not a readable index"),
        ('{"weight_map": {"a": "../other.bin"}}', r"names '\.\./other\.bin', which is no file of this folder"),
        ('{"weight_map": {"a": 3}}', "names 3"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, content: str, message: str) -> None:
    folder = golden_copy("base-fp32", tmp_path)
    (folder / "pytorch_model.bin.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as refused:
        open_checkpoint(folder)
    assert "pytorch_model.bin.index.json" in str(refused.value) and "chatglm pull" in str(refused.value)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    shutil.copy(MODELS / "base-fp16" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)


def test_a_pre_slim_checkpoint_is_seen_as_slim_without_its_image_rows() -> None:
    before = open_checkpoint(MODELS / "preslim-full-vocab")
    after = before.slim()
    assert (after.config.vocab_size, after.config.bos_token_id, after.config.era) == (130_528, 130_004, "slim")
    table = "transformer.word_embeddings.weight"
    assert torch.equal(read_tensor(after.tensors[table]), read_tensor(before.tensors[table])[20_000:])
    assert after.tensors[QKV] == before.tensors[QKV]
    assert after.slim() is after


@pytest.mark.parametrize("name", PREFIX_ONLY)
def test_a_tuned_prefix_goes_over_its_base_with_sizes_from_its_tensors(name: str) -> None:
    whole = open_checkpoint(MODELS / name.removesuffix("-prefix-only"))
    prefix = open_checkpoint(MODELS / name)
    assert prefix.is_prefix_only
    merged = whole.with_prefix(MODELS / name)
    assert merged.config == whole.config
    for tensor, entry in merged.tensors.items():
        assert entry.file.parent.name == (name if "prefix_encoder" in tensor else whole.folder.name)


def test_a_prefix_of_another_length_changes_the_config(tmp_path: Path) -> None:
    folder = golden_copy("ptuning-prefix-only", tmp_path)
    name = "transformer.prefix_encoder.embedding.weight"
    edit_tensors(folder / "pytorch_model.bin", lambda tensors: tensors.update({name: torch.ones(9, 128)}))
    (folder / "config.json").unlink()  # sizes come from the tensors alone
    config = open_checkpoint(MODELS / "ptuning").with_prefix(folder).config
    assert (config.pre_seq_len, config.prefix_projection) == (9, False)


def test_a_prefix_of_another_base_is_refused_with_both_shapes() -> None:
    with pytest.raises(
        CheckpointError, match=r"embedding\.weight is \[5, 128\]; with 3 layers of 32 it must be \[5, 192\]"
    ):
        open_checkpoint(MODELS / "base-fp16").with_prefix(MODELS / "ptuning-prefix-only")


def test_half_a_projected_prefix_is_refused(tmp_path: Path) -> None:
    folder = golden_copy("ptuning-projection-prefix-only", tmp_path)
    edit_tensors(folder / "pytorch_model.bin", lambda tensors: tensors.pop("transformer.prefix_encoder.trans.2.bias"))
    with pytest.raises(CheckpointError, match=r"trans\.2\.bias is missing"):
        open_checkpoint(MODELS / "ptuning-projection").with_prefix(folder)


def test_a_folder_without_a_prefix_is_no_prefix() -> None:
    with pytest.raises(CheckpointError, match=r"holds no `transformer\.prefix_encoder\.embedding\.weight`"):
        open_checkpoint(MODELS / "base-fp16").with_prefix(MODELS / "base-fp16")


def test_public_names_come_on_first_use_and_others_do_not_exist() -> None:
    from chatglm import checkpoint

    assert {"verify", "load_into", "hub"} <= set(dir(checkpoint))
    assert all(getattr(checkpoint, name) is not None for name in checkpoint.__all__)
    for _ in range(2):  # a module of the same name must not take the place of the function
        assert callable(checkpoint.convert) and callable(checkpoint.verify)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = checkpoint.nothing
