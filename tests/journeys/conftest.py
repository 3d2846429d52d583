"""A checkpoint of full size that every machine has room for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from chatglm.checkpoint.layout import original_names, original_shards
from chatglm.checkpoint.releases import shard_name
from chatglm.config import ModelConfig, to_original
from checkpoint_folders import GOLDEN


@pytest.fixture
def full_size(tmp_path: Path) -> Path:
    """A checkpoint of full size in the shards of the release, whose weights are holes that take no disk space."""
    import torch

    config, folder = ModelConfig(), tmp_path / "d"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_original(config)))
    shutil.copy(GOLDEN.parent / "tokenizer" / "ice_text.model", folder)
    shapes = {name: spec.shape for name, spec in original_names(config).items()}
    shards = original_shards(config)[0]
    where = {name: shard_name(index) for index, names in enumerate(shards) for name in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for index, names in enumerate(shards):
        weights = {name: torch.empty(shapes[name], dtype=torch.float16) for name in names}
        with torch.serialization.skip_data():
            torch.save(weights, folder / shard_name(index))
    return folder
