"""The store inside a server: metrics, and errors as clients are told them."""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from ..api_errors import APIError
from .records import Event
from .store import FeedbackStore, FeedbackUnavailable, Saved

if TYPE_CHECKING:
    from ..metrics import Metrics
    from .forwarding import FeedbackForwarder

T = TypeVar("T")


class FeedbackKeeper:
    """What routes and the page call. A rater is a browser's random id, or the name of a key."""

    def __init__(self, store: FeedbackStore | FeedbackForwarder, metrics: Metrics) -> None:
        self.store = store
        self._metrics = metrics

    async def save(self, event: Event) -> Saved:
        """Returns when it is on the disk. Raises APIError 503 when it is not stored."""
        saved = await self._wait(self.store.save(event))
        for kind in event.opinion.kinds:
            self._metrics.count(self._metrics.feedback, kind)
        return saved

    async def delete(self, answer_id: str, rater: str) -> int:
        """How many opinions went. Raises APIError 503."""
        gone = await self._wait(self.store.delete(answer_id, rater))
        if gone:
            self._metrics.count(self._metrics.feedback, "deleted")
        return gone

    @property
    def own(self) -> FeedbackStore:
        """The store of this server. Raises APIError 404 where another one keeps the feedback."""
        if isinstance(self.store, FeedbackStore):
            return self.store
        raise APIError(404, "not_found", "another server keeps the feedback of this one; ask it for the export")

    async def note_export(self, count: int) -> None:
        """Raises APIError 503: what is not in the audit table is not given out."""
        await self._wait(self.own.note_export(count))

    async def _wait(self, future: Future[T]) -> T:
        try:
            return await asyncio.wrap_future(future)
        except FeedbackUnavailable as error:
            self._metrics.count(self._metrics.feedback_errors)
            raise APIError(
                503, "feedback_unavailable", f"nothing was stored: {error}; send it again", headers={"Retry-After": "5"}
            ) from None
        except sqlite3.IntegrityError:
            self._metrics.count(self._metrics.feedback_errors)
            raise APIError(
                400, "invalid_value", "the feedback contradicts what is stored under these ids", param="answer.id"
            ) from None
