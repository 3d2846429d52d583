"""Running the server: sockets, signals, drain, exit status."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import DeviceError
from .api_errors import APIError
from .app import build_app
from .backend import Backend
from .json_answer import json_bytes
from .logs import RequestLog, set_up_logging

MAX_HEADERS = 32 << 10
SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread waits for the interpreter while the loop writes answers; Python's 5 ms are a step."""


class DrainingServer(uvicorn.Server):
    """The first signal lets running and waiting requests finish; the second ends the process."""

    def __init__(self, config: uvicorn.Config, backend: Backend, log: RequestLog) -> None:
        super().__init__(config)
        self._backend = backend
        self._log = log
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self.status = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Engine first, so that the first request is served."""
        self._loop = asyncio.get_running_loop()
        self._backend.on_broken = self._break
        await self._backend.open()
        await super().startup(sockets=sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets=sockets)
        await self._backend.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In the main thread, between two steps of the loop."""
        if self._backend.is_draining or self._loop is None:
            os._exit(128 + sig)
        self._backend.is_draining = True
        self._loop.call_soon_threadsafe(self._begin_drain, sig)

    def _begin_drain(self, sig: int) -> None:
        self._log.event("draining", signal=signal.Signals(sig).name, live=self._backend.num_live)
        self._task = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        backend = self._backend
        deadline = asyncio.get_running_loop().time() + backend.settings.drain_timeout_s
        while backend.num_live and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        if backend.num_live:
            backend.thread.cancel_all("draining")
            for _ in range(40):
                if not backend.num_live:
                    break
                await asyncio.sleep(0.05)
        self.should_exit = True

    def _break(self) -> None:
        """The engine cannot be built again: leave it to the supervisor."""
        self.status = 1
        self.should_exit = True


class BoundedProtocol(H11Protocol):
    """Headers have a time limit and a size limit; what breaks them is told in the common shape."""

    header_timeout_s = 20.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._headers_due = self.loop.call_later(self.header_timeout_s, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_due.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._headers_due.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            self._headers_due.cancel()
            self._headers_due = self.loop.call_later(self.header_timeout_s, self._late)

    def _late(self) -> None:
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Something that is not HTTP, or headers beyond the limit."""
        is_large = self.conn.trailing_data[0] and len(self.conn.trailing_data[0]) >= MAX_HEADERS
        error = (
            APIError(431, "headers_too_large", f"the headers are larger than {MAX_HEADERS:,} bytes")
            if is_large
            else APIError(400, "invalid_request", "this is not an HTTP request")
        )
        body = json_bytes(error.body(""))
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        response = h11.Response(status_code=error.status, headers=[*head, (b"connection", b"close")], reason=b"")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises DeviceError, in one line, when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise DeviceError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            cure=f"see who has it with `ss -ltnp 'sport = :{port}'`, or give another --port (0: any free one)",
        ) from error
    found.set_inheritable(True)
    return found


def raise_file_limit() -> int:
    """The soft limit of open files raised to the hard one; the value."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        return soft
    return hard


def run_server(backend: Backend, listener: socket.socket, log: RequestLog) -> int:
    """Serve until a signal; the exit status."""
    settings = backend.settings
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    set_up_logging(log)
    protocol = type("Protocol", (BoundedProtocol,), {"header_timeout_s": settings.read_timeout_s})
    config = uvicorn.Config(
        build_app(backend, log),
        http=protocol,
        ws="none",
        lifespan="on" if settings.web else "off",  # the page has one
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        backlog=4096,
    )
    host, port = listener.getsockname()[:2]
    pool = backend.thread.engine.pool
    log.event(
        "listening",
        url=f"http://{'[' + host + ']' if ':' in host else host}:{port}",
        model=backend.model_name,
        cache_blocks=pool.num_blocks,
        cache_tokens=pool.num_blocks * 16,
        full_sequences=pool.num_blocks * 16 // backend.context,
        prefill_budget=backend.thread.engine.prefill_budget,
        open_files=raise_file_limit(),
    )
    if settings.log_prompts:
        log.event("log", level="warning", message="--log-prompts: every prompt and answer goes into this log")
    server = DrainingServer(config, backend, log)
    server.run(sockets=[listener])
    return server.status
