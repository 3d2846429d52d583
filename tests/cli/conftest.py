"""The embedded model, loaded once for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import chatglm
from chatglm import ChatModel


@pytest.fixture(scope="session")
def model() -> Iterator[ChatModel]:
    import torch

    threads = torch.get_num_threads()
    yield chatglm.load(threads=1)
    torch.set_num_threads(threads)
