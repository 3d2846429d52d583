"""Answers while a client may leave: server-sent events, and whole answers that wait for the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .api_errors import APIError
from .border import ClientGone
from .exchange import Exchange, News, error_of
from .json_answer import json_bytes

KEEP_ALIVE_S = 15.0
HEADERS_AFTER_S = 5.0
"""A stream's status is sent with the first news, or after so long."""

DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json_bytes(content) + b"\n\n"


async def wait_for_answer(
    request: Request, job: Callable[[], Awaitable[Response]], exchanges: list[Exchange]
) -> Response:
    """Run `job`, and cancel the exchanges as soon as the client has gone. Raises ClientGone."""
    work = asyncio.ensure_future(job())
    watcher = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        for exchange in exchanges:
            exchange.cancel()
        raise ClientGone
    finally:
        for task in (work, watcher):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of events made from the news of exchanges.

    chunks(news) gives the events for one piece of news; `last` those after the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        request_id: str,
        exchanges: list[Exchange],
        chunks: Callable[[int, News], list[dict[str, Any]]],
        last: Callable[[], list[dict[str, Any]]],
        first: Callable[[], list[dict[str, Any]]],
        close: Callable[[], None],
    ) -> None:
        self.status_code = 200
        self.background = None
        self._request_id = request_id
        self._exchanges = exchanges
        self._chunks = chunks
        self._first = first
        self._last = last
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.ensure_future(_disconnect(receive))
        work = asyncio.ensure_future(self._stream(send))
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                for exchange in self._exchanges:
                    exchange.cancel()
                return  # nobody is there to read the rest
            work.result()
        finally:
            for task in (work, watcher):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
            self._close()

    async def _stream(self, send: Send) -> None:
        """The first news decide about the status; what goes wrong later is an event without [DONE]."""
        started = False

        async def write(data: bytes) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                await send(
                    {"type": "http.response.body", "body": b"".join(map(event, self._first())), "more_body": True}
                )
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            async for number, news in merged(self._exchanges):
                if news is None:
                    await write(b": keep-alive\n\n" if started else b"")
                    continue
                if news.finish not in (None, "stop", "length"):
                    raise error_of(news)
                data = b"".join(event(chunk) for chunk in self._chunks(number, news))
                if data:
                    await write(data)
            await write(b"".join(map(event, self._last())) + DONE)
        except APIError as error:
            for exchange in self._exchanges:
                exchange.cancel()
            if not started:
                raise
            await write(event(error.body(self._request_id)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def merged(exchanges: list[Exchange]) -> AsyncIterator[tuple[int, News | None]]:
    """News of several exchanges as they come, with the exchange's number; None after silence."""
    waiting: dict[asyncio.Task[list[News]], int] = {}
    timeout = HEADERS_AFTER_S
    try:
        for number, exchange in enumerate(exchanges):
            waiting[asyncio.ensure_future(exchange.next())] = number
        while waiting:
            done, _ = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            timeout = KEEP_ALIVE_S
            if not done:
                yield 0, None
            for task in done:
                number = waiting.pop(task)
                for news in task.result():
                    yield number, news
                if not exchanges[number].is_over:
                    waiting[asyncio.ensure_future(exchanges[number].next())] = number
    finally:
        for task in waiting:
            task.cancel()
