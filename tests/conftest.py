"""Where the tests find their data: `tests/data` is shipped, `../shared` may be absent."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import hypothesis
import pytest

DATA = Path(__file__).parent / "data"

# no timed assertions; the same examples on every CI run
hypothesis.settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("house")

# threads that wait by spinning starve each other where several test processes share two cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="session")
def first_release_file(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SentencePiece file of the first release, derived from the later one (tests/data/tokenizer/README.md).

    The last 344 pieces and the trainer's byte_fallback go; the result has the official size and sha256.
    """
    raw = tokenizer_file.read_bytes()
    first_appended = raw.index(b"\n\x0f\n\x06[MASK]")
    last_appended = b"\n\x0f\n\x06<0xFF>\x15\x00\x00\x00\x00\x18\x06"
    rest = raw[raw.index(last_appended) + len(last_appended) :]
    size, byte_fallback = rest[1], b"\x98\x02\x01"  # `rest` begins with the trainer's message: key, size, fields
    trainer = rest[2 : 2 + size].replace(byte_fallback, b"")
    derived = raw[:first_appended] + rest[:1] + bytes([len(trainer)]) + trainer + rest[2 + size :]
    assert len(derived) == 2_699_926
    assert hashlib.sha256(derived).hexdigest() == "99871e0c85db81ad7af1028854fd091cd5778c8414ae9d94bbbc10d02c831c21"
    path = tmp_path_factory.mktemp("first-release") / "ice_text.model"
    path.write_bytes(derived)
    return path
