"""Whole files that do not fit each other: shapes, eras, tokenizers, values. Each is one clear problem."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_broken_weight_files import only_problem

from chatglm.checkpoint import Checkpoint, TensorEntry, check, expected_tensors, open_checkpoint, verify
from chatglm.checkpoint.releases import RELEASES, shard_name
from chatglm.config import ModelConfig, to_original
from chatglm.errors import CheckpointError
from checkpoint_folders import (
    NAMES,
    edit_json,
    edit_tensors,
    first_release,
    golden_copy,
    small_safetensors,
)
from golden_vectors import GOLDEN

TABLE = "transformer.word_embeddings.weight"
DENSE = "transformer.layers.0.attention.dense.weight"
PRE_SLIM_IDS = {"bos_token_id": 150_004, "eos_token_id": 150_005, "pad_token_id": 20_003}
SLIM_IDS = {"bos_token_id": 130_004, "eos_token_id": 130_005, "pad_token_id": 3}
ABSENT = {"mask_token_id": None, "gmask_token_id": None}


@pytest.mark.parametrize("name", NAMES)
def test_every_golden_checkpoint_is_sound_to_the_last_byte(tmp_path: Path, name: str, tokenizer_file: Path) -> None:
    folder = golden_copy(name, tmp_path)
    if name == "slim-full-vocab":
        shutil.copy(tokenizer_file, folder)
    if name == "preslim-full-vocab":
        (folder / "ice_text.model").write_bytes(first_release(tokenizer_file.read_bytes()))
    assert verify(folder, deep=True) == []
    check(folder)


def test_no_folder_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        ("{", "is no JSON object"),
        ("[]", "is no JSON object"),
        ('{"num_layers": 0}', "cannot be: `num_layers` is 0"),
        ('{"model_type": "llama"}', "cannot be: model_type is 'llama'"),
        ('{"multi_query_attention": true}', "another architecture"),
    ],
)
def test_a_config_that_cannot_be_is_one_problem(tmp_path: Path, content: str | None, message: str) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    problem = only_problem(folder, deep=True)
    assert problem.file == "config.json" and message in problem.what


def test_an_empty_folder_lacks_its_config_and_its_weights(tmp_path: Path) -> None:
    assert [problem.what[:16] for problem in verify(tmp_path)] == ["is missing", "holds no weights"]


def test_an_unknown_key_of_the_config_is_no_problem(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    edit_json(folder / "config.json", surprise=1)
    assert verify(folder) == []


def test_a_missing_tensor_is_named_with_its_shape(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    edit_tensors(folder / "pytorch_model.bin", lambda tensors: tensors.pop(DENSE))
    problem = only_problem(folder)
    assert problem.file == "pytorch_model.bin" and problem.tensor == f"{DENSE} [32, 32]"
    assert problem.what == "lacks a tensor that config.json asks for"


def test_many_missing_tensors_are_one_problem_with_a_number(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    edit_json(folder / "config.json", num_layers=9)
    problem = only_problem(folder)
    assert problem.tensor == "transformer.layers.3.input_layernorm.weight [32] (and 71 more)"
    assert "config.json must describe these weights" in problem.cure


def test_missing_tensors_without_an_index_are_not_told_beside_a_broken_file(tmp_path: Path) -> None:
    folder = golden_copy("base-fp32", tmp_path)
    (folder / "pytorch_model.bin.index.json").unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    assert only_problem(folder).what == "is empty (0 bytes)"


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    edit_json(folder / "config.json", num_layers=2)
    problem = only_problem(folder)
    assert problem.what == "holds a tensor that config.json does not know" and "(and 11 more)" in problem.tensor
    assert "num_layers is 2" in problem.cure


def test_a_wrong_shape_is_told_with_both(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    edit_tensors(folder / "pytorch_model.bin", lambda tensors: tensors.update({DENSE: torch.zeros(32, 31)}))
    problem = only_problem(folder)
    assert problem.what == "holds a tensor of shape [32, 31] where config.json asks for [32, 32]"
    assert problem.tensor.startswith(DENSE)


def test_codes_where_floats_should_be_are_told(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    codes = torch.zeros(32, 32, dtype=torch.int8)
    edit_tensors(folder / "pytorch_model.bin", lambda tensors: tensors.update({DENSE: codes}))
    problem = only_problem(folder)
    assert problem.what == "holds a tensor of int8 where config.json asks for float16 or bfloat16 or float32"
    assert "quantization_bit" in problem.cure


def test_a_quantised_checkpoint_under_a_plain_config_is_one_problem_of_each_kind(tmp_path: Path) -> None:
    folder = golden_copy("int8", tmp_path)
    edit_json(folder / "config.json", quantization_bit=None)
    kinds = [problem.what.split(" config.json")[0] for problem in verify(folder)]
    assert kinds == ["holds a tensor that", "holds a tensor of int8 where"]


def test_a_base_whose_config_promises_a_prefix_says_what_to_do(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    edit_json(folder / "config.json", pre_seq_len=5)
    problem = only_problem(folder)
    assert "prefix_encoder.embedding.weight [5, 192]" in problem.tensor and "P-tuning folder" in problem.cure


def test_a_prefix_of_other_sizes_than_its_config_is_told(tmp_path: Path) -> None:
    folder = golden_copy("ptuning-prefix-only", tmp_path)
    edit_json(folder / "config.json", pre_seq_len=6)
    assert "[5, 128] where config.json asks for [6, 128]" in only_problem(folder).what


@pytest.mark.parametrize(
    ("weights", "ids", "rows", "message"),
    [
        ("slim-full-vocab", PRE_SLIM_IDS | ABSENT, 150_528, "has pre-slim ids (<sop> is 150004; 2023-03-14 to 04-05)"),
        ("slim-full-vocab", PRE_SLIM_IDS | ABSENT, 130_528, "has pre-slim ids"),
        ("preslim-full-vocab", SLIM_IDS, 130_528, "has slim ids (<sop> is 130004; from 2023-04-06 on)"),
        ("preslim-full-vocab", SLIM_IDS, 150_528, "has slim ids"),
    ],
)
def test_ids_and_weights_of_two_eras_are_one_problem_with_both_and_the_cure(
    tmp_path: Path, tokenizer_file: Path, weights: str, ids: dict[str, int], rows: int, message: str
) -> None:
    folder = golden_copy(weights, tmp_path)
    shutil.copy(tokenizer_file, folder)
    edit_json(folder / "config.json", vocab_size=rows, **ids)
    problem = only_problem(folder)
    stored = "130,528 rows; from 2023-04-06" if weights.startswith("slim") else "150,528 rows; 2023-03-14"
    era = "slim weights" if weights.startswith("slim") else "pre-slim weights"
    assert problem.file == "config.json" and message in problem.what
    assert f"pytorch_model.bin has {era} ({stored}" in problem.what and problem.tensor.startswith(TABLE)
    assert "chatglm convert --to-slim" in problem.cure and "chatglm pull" in problem.cure


def test_a_tokenizer_of_another_era_is_one_problem(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = golden_copy("slim-full-vocab", tmp_path)
    (folder / "ice_text.model").write_bytes(first_release(tokenizer_file.read_bytes()))
    problem = only_problem(folder)
    assert problem.file == "ice_text.model" and "pre-slim ids" in problem.what and "slim ids" in problem.what
    folder = golden_copy("preslim-full-vocab", tmp_path)
    shutil.copy(tokenizer_file, folder)
    assert "the config needs 130,000 pieces (pre-slim ids)" in only_problem(folder).what


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 2706249\n", "is a Git-LFS pointer"),
        (b"", "is empty (0 bytes)"),
        (b"noise" * 30, "is not a SentencePiece file"),
    ],
)
def test_a_broken_tokenizer_file_is_one_problem(tmp_path: Path, content: bytes | None, message: str) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    (folder / "ice_text.model").unlink()
    if content is not None:
        (folder / "ice_text.model").write_bytes(content)
    problem = only_problem(folder)
    assert problem.file == "ice_text.model" and problem.what.startswith(message)
    if content is None:
        assert verify(folder, tokenizer=False) == []


def test_a_truncated_tokenizer_file_is_one_problem(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    data = (folder / "ice_text.model").read_bytes()
    (folder / "ice_text.model").write_bytes(data[: len(data) // 2])
    assert only_problem(folder).what.startswith("is truncated or damaged")


def test_a_tokenizer_of_another_model_is_one_problem(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    shutil.copy(tokenizer_file, folder)
    problem = only_problem(folder)
    assert "130,344 pieces" in problem.what and "544 pieces" in problem.what


def test_a_released_set_of_weights_must_have_its_own_tokenizer_file(tmp_path: Path, tokenizer_file: Path) -> None:
    """Shards that all have a release's sizes; sparse files, so their contents are problems too."""
    (tmp_path / "config.json").write_text(json.dumps(to_original(ModelConfig())))
    for index, size in enumerate(RELEASES[0].sizes):
        with (tmp_path / shard_name(index)).open("wb") as file:
            file.truncate(size)
    shutil.copy(tokenizer_file, tmp_path)
    assert [problem for problem in verify(tmp_path) if problem.file == "ice_text.model"] == []
    ignored_field = b"\xa2\x06\x01x"  # number 100, which SentencePiece skips
    (tmp_path / "ice_text.model").write_bytes(tokenizer_file.read_bytes() + ignored_field)
    (problem,) = [problem for problem in verify(tmp_path) if problem.file == "ice_text.model"]
    entry = TensorEntry("a", (1,), "float16", tmp_path / shard_name(0), 0)
    shards = {str(k): replace(entry, file=tmp_path / shard_name(k)) for k in range(8)}
    assert Checkpoint(tmp_path, ModelConfig(), shards, None).release == "v1.1.0 or v0.1.0"
    assert open_checkpoint(GOLDEN / "models" / "base-fp16").release is None
    assert "the weights are those of v1.1.0 or v0.1.0" in problem.what and "5e974d9a69c242ce" in problem.what
    with (tmp_path / shard_name(7)).open("r+b") as file:
        file.truncate(RELEASES[0].sizes[7] - 1)
    assert [problem for problem in verify(tmp_path) if problem.file == "ice_text.model"] == []  # a hash is a note


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_found_by_the_deep_check_only(tmp_path: Path, value: float) -> None:
    folder = small_safetensors(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[DENSE][3, 3] = value
    save_file(tensors, folder / "model.safetensors")
    assert verify(folder) == []
    problem = only_problem(folder, deep=True)
    assert problem.what == "holds NaN or infinite values" and problem.tensor == f"{DENSE} [16, 16] float16"


def test_a_damaged_byte_is_found_by_its_checksum(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    path = folder / "pytorch_model.bin"
    entry = open_checkpoint(folder).tensors[DENSE]
    data = bytearray(path.read_bytes())
    data[entry.offset + 6] ^= 1
    path.write_bytes(data)
    assert verify(folder) == []
    problem = only_problem(folder, deep=True)
    assert problem.file == "pytorch_model.bin" and "is damaged (Bad CRC-32 for file" in problem.what


def test_files_without_checksums_are_not_taken_for_damaged(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, folder / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        assert {info.CRC for info in archive.infolist()} == {0}
    assert verify(folder, deep=True) == []


@pytest.mark.parametrize("name", ["ptuning", "int4-qe"])
def test_a_tied_head_that_differs_is_found_by_the_deep_check(tmp_path: Path, name: str) -> None:
    folder = golden_copy(name, tmp_path)
    head = "lm_head.weight" if name == "ptuning" else "lm_head.weight_scale"

    def differ(tensors: dict[str, torch.Tensor]) -> None:
        tensors[head] = tensors[head].clone()
        tensors[head][0] += 1

    edit_tensors(folder / "pytorch_model.bin", differ)
    problem = only_problem(folder, deep=True)
    assert "differs from the embedding" in problem.what and problem.tensor.startswith(head)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert verify(folder, deep=True) == []


def test_the_deep_check_tells_its_progress(tmp_path: Path) -> None:
    folder = golden_copy("base-fp32", tmp_path)
    seen: list[tuple[int, int, str]] = []
    assert verify(folder, deep=True, progress=lambda *now: seen.append(now)) == []
    assert seen[-1][0] == seen[-1][1] == 2 * open_checkpoint(folder).nbytes


MEASURE = """
import sys
from chatglm.checkpoint import open_checkpoint, verify
print(len(verify(sys.argv[1])), open_checkpoint(sys.argv[1]).nbytes)
assert "torch" not in sys.modules
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_full_size_checkpoint_is_verified_and_opened_without_reading_it(tmp_path: Path, tokenizer_file: Path) -> None:
    """12 GB as a sparse file: reading or mapping it would show in the memory, and torch is not even imported."""
    header, end = {}, 0
    for name, spec in expected_tensors(ModelConfig()).items():
        if not spec.is_optional:
            header[name] = {"dtype": "F16", "shape": spec.shape, "data_offsets": [end, end + 2 * spec.elements]}
            end += 2 * spec.elements
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(to_original(ModelConfig())))
    shutil.copy(tokenizer_file, tmp_path)
    run = [sys.executable, "-c", MEASURE, str(tmp_path)]
    problems, nbytes, peak_kb = map(int, subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    assert (problems, nbytes) == (0, 12_346_572_800)
    assert peak_kb < 300_000
