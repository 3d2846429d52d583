"""Checkpoint folders as a user has them, put together from the golden models and the tokenizer files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import chatglm.hf  # registers the classes

torch.set_num_threads(min(2, torch.get_num_threads()))

MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def make_folder(golden: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """make_folder(model, tokenizer=…) copies `models/<model>` with a tokenizer file; by default the one that fits."""

    def make(model: str, tokenizer: Path | None = None) -> Path:
        folder = tmp_path_factory.mktemp(model) / "checkpoint"
        shutil.copytree(golden / "models" / model, folder)
        if tokenizer is not None:
            shutil.copy(tokenizer, folder / "ice_text.model")
        elif model == "slim-full-vocab":
            shutil.copy(tokenizer_file, folder / "ice_text.model")
        else:
            for file in (golden / "tokenizer-reduced").iterdir():
                shutil.copy(file, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def slim_folder(make_folder: MakeFolder) -> Path:
    """The real vocabulary of v1.1.0 on a tiny network."""
    return make_folder("slim-full-vocab")


@pytest.fixture(scope="session")
def first_release_folder(make_folder: MakeFolder, first_release_file: Path) -> Path:
    return make_folder("preslim-full-vocab", first_release_file)


@pytest.fixture(scope="session")
def small_folder(make_folder: MakeFolder) -> Path:
    """base-fp32 with the reduced tokenizer."""
    return make_folder("base-fp32")


@pytest.fixture(scope="session")
def mini_folder() -> Path:
    """The embedded model."""
    folder = Path(chatglm.__file__).parent / "assets" / "mini"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the embedded model is not in this checkout")
    return folder
