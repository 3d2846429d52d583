"""Exchange: one request between the HTTP side and the engine. The engine never waits for a client.

News are put in by the loop's thread and taken out by the request's handler. What a client does not read is merged, and
beyond a limit the request is cancelled.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from ..engine.serving_state import StreamEvent
from ..engine.stream import Group, TokenInfo
from ..engine.thread import EngineThread
from .api_errors import APIError, ending_error

MAX_UNREAD = 1 << 20
"""Bytes of text (and 64 for each log-probability) that may wait for a slow reader."""


@dataclass
class News:
    """Text of one choice, the tokens behind it, and how it ended."""

    choice: int
    text: str = ""
    infos: list[TokenInfo] = field(default_factory=list)
    finish: str | None = None
    code: str | None = None

    @property
    def size(self) -> int:
        return 4 * len(self.text) + sum(64 * (1 + len(info.top)) for info in self.infos)


class Exchange:
    """A submitted group and what is known of it so far."""

    def __init__(self, thread: EngineThread, group: Group) -> None:
        self.group = group
        self._thread = thread
        self._news: deque[News] = deque()
        self._unread = 0
        self._arrived = asyncio.Event()
        self._open = len(group.streams)
        self.finish = ""
        self.is_slow = False

    # The loop's side

    def put(self, event: StreamEvent) -> None:
        """News from the engine."""
        choice = event.stream.choice
        last = next((news for news in reversed(self._news) if news.choice == choice), None)
        if last is not None and last.finish is None:
            self._unread -= last.size
            last.text += event.text
            last.infos += event.infos
            last.finish, last.code = event.finish, event.code
        else:
            last = News(choice, event.text, list(event.infos), event.finish, event.code)
            self._news.append(last)
        self._unread += last.size
        if event.finish is not None:
            self._open -= 1
            self.finish = event.finish
        if self._unread > MAX_UNREAD and not self.is_slow:
            self.is_slow = True
            self._thread.cancel(self.group.id, "slow_client")
        self._arrived.set()

    def fail(self, code: str) -> None:
        """The engine is gone: every choice that is open ends with an error."""
        for stream in self.group.streams:
            self._news.append(News(stream.choice, finish="error", code=code))
        self._open, self.finish = 0, "error"
        self._arrived.set()

    # The handler's side

    @property
    def is_over(self) -> bool:
        """Every choice has ended and all news were taken."""
        return self._open <= 0 and not self._news

    def cancel(self, code: str = "cancelled") -> None:
        """The client has no more use for it."""
        self._thread.cancel(self.group.id, code)

    async def next(self, timeout_s: float | None = None) -> list[News]:
        """News that have come, waiting for some; empty after the timeout."""
        if not self._news:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout_s)
            except asyncio.TimeoutError:
                return []
        news, self._news, self._unread = list(self._news), deque(), 0
        return news

    async def all(self) -> AsyncIterator[News]:
        """News until the end. Raises APIError when a choice ended by an error."""
        while not self.is_over:
            for news in await self.next():
                if news.finish not in (None, "stop", "length"):
                    raise error_of(news)
                yield news


def error_of(news: News) -> APIError:
    """What the client is told when the engine ended a choice."""
    return ending_error("request_timeout" if news.finish == "timeout" else news.code)
