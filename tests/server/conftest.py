"""One server for most tests; after each the same audit runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
pytest.importorskip("httpx")

from server_process import ServerProcess


@pytest.fixture(scope="session")
def shared_server() -> Iterator[ServerProcess]:
    server = ServerProcess("--context-cache", "0", "--legacy-api", "--kv-memory", "400MB")
    yield server
    assert server.stop() == 0
    server.close()


@pytest.fixture
def server(shared_server: ServerProcess) -> Iterator[ServerProcess]:
    yield shared_server
    shared_server.audit()


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    """Start servers of one's own; they are gone after the test."""
    started: list[ServerProcess] = []

    def begin(*options: str, **more) -> ServerProcess:
        started.append(ServerProcess(*options, **more))
        return started[-1]

    yield begin
    for each in started:
        each.close()
