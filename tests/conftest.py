"""Where the tests find their data: `tests/data` is shipped, `../shared` may be absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def data() -> Path:
    """The shipped test data."""
    return DATA


@pytest.fixture(scope="session")
def golden() -> Path:
    """Vectors from the original code (tests/data/golden/README.md)."""
    return DATA / "golden"


@pytest.fixture(scope="session")
def tokenizer_file() -> Path:
    """The genuine SentencePiece file of the slim era."""
    return DATA / "tokenizer" / "ice_text.model"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data beside the checkout that is not shipped (held-out dialogues, references)."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the shared data folder beside the checkout is absent")
    return folder
