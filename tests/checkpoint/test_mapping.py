"""Codes of quantised weights are used where the file cache holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chatglm.checkpoint import load_into, open_checkpoint, random_checkpoint
from chatglm.checkpoint.mapping import SMALLEST_MAPPED, MappedFiles
from chatglm.checkpoint.reading import read_tensor
from chatglm.config import ModelConfig
from chatglm.model import GLM
from chatglm.quantization import swap_as_described

CONFIG = ModelConfig(
    vocab_size=2_048,
    hidden_size=1_024,
    num_layers=1,
    num_heads=8,
    inner_hidden_size=4_096,
    max_sequence_length=64,
    bos_token_id=2_000,
    gmask_token_id=2_001,
    mask_token_id=2_002,
    eos_token_id=2_003,
).quantized(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("mapped") / "model", CONFIG, layout="safetensors")


def loaded(folder: Path) -> GLM:
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        model = GLM(checkpoint.config.quantized(0))
    swap_as_described(model, checkpoint.config)
    load_into(model, checkpoint, dtype=torch.float32)
    return model


def test_mapped_codes_are_those_that_reading_gives(folder: Path) -> None:
    files, mapped = MappedFiles(), 0
    for entry in open_checkpoint(folder).tensors.values():
        codes = files.codes(entry)
        large = entry.dtype in ("uint8", "int8") and entry.nbytes >= SMALLEST_MAPPED
        assert (codes is not None) == large
        if codes is not None:
            wanted = read_tensor(entry)
            assert codes.dtype == wanted.dtype and codes.is_contiguous() and torch.equal(codes, wanted)
            mapped += 1
    assert mapped >= 4


def test_writing_to_a_loaded_model_leaves_the_file_alone(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    model = loaded(folder)
    weight = model.transformer.layers[0].get_submodule("mlp.dense_h_to_4h").weight
    weight.zero_()
    assert {path: path.read_bytes() for path in before} == before
    assert bool(loaded(folder).transformer.layers[0].get_submodule("mlp.dense_h_to_4h").weight.any())


def test_a_checkpoint_that_is_written_anew_leaves_a_loaded_model_alone(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", CONFIG, layout="safetensors")
    model = loaded(folder)
    weight = model.transformer.layers[0].get_submodule("attention.query_key_value").weight
    before = weight.clone()
    random_checkpoint(folder, CONFIG, seed=1, layout="safetensors", overwrite=True)
    assert torch.equal(weight, before)
    assert not torch.equal(
        loaded(folder).transformer.layers[0].get_submodule("attention.query_key_value").weight, before
    )
