"""Tokenizers of every form of the file, loaded once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chatglm
from chatglm.tokenizer import Tokenizer

Lines = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    """The official file of the slim era."""
    return Tokenizer.from_file(tokenizer_file)


@pytest.fixture(scope="session")
def first_release(first_release_file: Path) -> Tokenizer:
    """The official file of the pre-slim era."""
    return Tokenizer.from_file(first_release_file)


@pytest.fixture(scope="session")
def reduced_file(golden: Path) -> Path:
    """A small file of the same structure: special ids from 200 on."""
    return golden / "tokenizer-reduced" / "ice_text.model"


@pytest.fixture(scope="session")
def reduced(reduced_file: Path) -> Tokenizer:
    return Tokenizer.from_file(reduced_file)


@pytest.fixture(scope="session")
def embedded() -> Tokenizer:
    """The embedded model's own tokenizer: special ids from 12,000 on."""
    return Tokenizer.from_folder(Path(chatglm.__file__).parent / "assets" / "mini")


@pytest.fixture(scope="session")
def lines(golden: Path) -> Lines:
    """Reader of the recorded tokenizer cases by file name."""

    def read(name: str) -> list[dict[str, Any]]:
        text = (golden / "tokenizer" / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]

    return read
