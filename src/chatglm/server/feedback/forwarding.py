"""Feedback that belongs to another server: kept in a folder first, then posted there until it is taken."""

from __future__ import annotations

import json
import logging
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from .records import Answer, Event
from .spool import Spool, SpoolFull
from .store import FeedbackUnavailable, Saved

logger = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT_S = 20.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
NEVER_TAKEN = frozenset({400, 413, 415, 422})
"""Statuses that say something about the opinion itself. Every other failure may be over later."""


class FeedbackForwarder:
    """In the place of a FeedbackStore. Raises RequestError when the folder cannot be used.

    url: the other server's address, without /v1/feedback; key: one of its API keys.
    """

    def __init__(self, url: str, key: str | None, folder: str | Path, *, first_wait_s: float = FIRST_WAIT_S) -> None:
        self._url, self._key, self._first_wait_s = url.rstrip("/"), key, first_wait_s
        self._spool = Spool(folder)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="feedback-writer")
        self._opener = urllib.request.build_opener(_NoRedirect())
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="feedback-sender", daemon=True)
        self._thread.start()

    def save(self, event: Event) -> Future[Saved]:
        """Keep it for sending; the future raises FeedbackUnavailable."""
        item = {"method": "POST", "path": "/v1/feedback", "body": body_of(event)}
        return self._put(item, lambda name: Saved(name, True))

    def delete(self, answer_id: str, rater: str) -> Future[int]:
        """Keep the wish for sending. Whether there was such an opinion is known by the other server alone: 1."""
        query = urllib.parse.urlencode({"rater": rater_name(rater)})
        item = {"method": "DELETE", "path": f"/v1/feedback/{urllib.parse.quote(answer_id, safe='')}?{query}"}
        return self._put(item, lambda name: 1)

    def close(self) -> None:
        """After what was given is on the disk; what was not sent waits there for the next start."""
        if not self._closed.is_set():
            self._writer.shutdown()
            self._closed.set()
            self._wake.set()
            self._thread.join(TIMEOUT_S + 5)
            self._spool.close()

    def _put(self, item: dict[str, Any], result: Callable[[str], T]) -> Future[T]:
        def write() -> T:
            try:
                name = self._spool.put(item)
            except SpoolFull as error:
                raise FeedbackUnavailable(str(error)) from error
            self._wake.set()
            return result(name)

        return self._writer.submit(write)

    # The sender's thread

    def _run(self) -> None:
        wait = self._first_wait_s
        while not self._closed.is_set():
            self._wake.clear()
            try:
                with self._spool.sending() as may_send:
                    is_behind = not may_send or not self._send_all()
            except Exception:  # a fault of ours: what waits is not touched, and is tried again
                logger.exception("feedback could not be sent on")
                is_behind = True
            if is_behind:
                self._closed.wait(wait)
                wait = min(2 * wait, LONGEST_WAIT_S)
            else:
                wait = self._first_wait_s
                if not self._closed.is_set():
                    self._wake.wait(LONGEST_WAIT_S)  # not longer: another process may have put something

    def _send_all(self) -> bool:
        """In their order, as an opinion may be followed by its change. False: the first one has to wait."""
        for path in self._spool.waiting():
            if self._closed.is_set():
                return True
            try:
                item = json.loads(path.read_text(encoding="utf-8"))
                status = self._send(item)
            except (OSError, urllib.error.URLError) as error:
                logger.warning("feedback waits: %s cannot be reached (%s)", self._url, getattr(error, "reason", error))
                return False
            is_gone = item["method"] == "DELETE" and status == 404
            if status < 300 or is_gone:
                self._spool.done(path)
            elif status in NEVER_TAKEN:
                kept = self._spool.refuse(path)
                logger.error("feedback was refused by %s with %d and stays in %s", self._url, status, kept)
            else:
                logger.warning("feedback waits: %s answers %d", self._url, status)
                return False
        return True

    def _send(self, item: dict[str, Any]) -> int:
        """The status. Raises OSError when there is no answer."""
        body = json.dumps(item["body"], ensure_ascii=False).encode() if "body" in item else None
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self._url + item["path"], body, headers, method=item["method"])
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key goes to the server that was named, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def rater_name(rater: str) -> str:
    """As `POST /v1/feedback` takes it; names of keys may have other characters."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", rater)[:64] or "unknown"


def body_of(event: Event) -> dict[str, Any]:
    """What `POST /v1/feedback` takes."""
    talk, opinion = event.conversation, event.opinion
    conversation = {"id": talk.id, "created_at": talk.created_at, "language": talk.language[:16]}
    answers = {answer.id: _answer(answer) for answer in event.answers}
    body: dict[str, Any] = {"conversation": conversation, "answer": answers[opinion.answer_id]}
    if opinion.preferred_over is not None:
        body["preferred_over"] = answers[opinion.preferred_over]
    for name in ("thumb", "rating", "correction", "comment"):
        if getattr(opinion, name) is not None:
            body[name] = getattr(opinion, name)
    return {**body, "tags": list(opinion.tags), "rater": rater_name(opinion.rater)}


def _answer(answer: Answer) -> dict[str, Any]:
    given = {name: value for name, value in vars(answer).items() if name not in ("conversation_id", "prompt_hash")}
    return {**given, "prompt_ids_sha256": answer.prompt_hash, "latency_ms": max(0, answer.latency_ms)}
