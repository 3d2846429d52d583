"""FeedbackStore: one thread that writes, one transaction for each event.

The caller gets a future. When it has a result the row is on the disk (WAL, synchronous=FULL); when it has an error
nothing of the event is there. Several processes may write to one file.
"""

from __future__ import annotations

import json
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ids import now_ms, uuid7
from .records import Answer, Conversation, Event, Opinion
from .schema import BUSY_TIMEOUT_S, open_for_writing

logger = logging.getLogger(__name__)

GIVE_UP_S = 8.0
"""How long a write is tried again while another process has the file locked."""

MAX_WAITING = 256


class FeedbackUnavailable(Exception):
    """Nothing was stored: the disk is full, the file stayed locked, too many writes wait."""


@dataclass(frozen=True)
class Saved:
    """What became of an event. is_new: false when it replaced what this rater had said before."""

    id: str
    is_new: bool


@dataclass
class _Job:
    work: Callable[[sqlite3.Connection], Any]
    due: float
    future: Future[Any]


class FeedbackStore:
    """Raises RequestError when the file cannot be used (see schema.py)."""

    def __init__(
        self, path: str | Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S, give_up_s: float = GIVE_UP_S
    ) -> None:
        self.path = Path(path)
        self._busy_timeout_s, self._give_up_s = busy_timeout_s, give_up_s
        self._connection = open_for_writing(self.path, busy_timeout_s)
        self._jobs: queue.Queue[_Job | None] = queue.Queue(MAX_WAITING)
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="feedback-writer", daemon=True)
        self._thread.start()

    def save(self, event: Event) -> Future[Saved]:
        """Store or replace; the future raises FeedbackUnavailable."""
        return self.submit(lambda connection: _save(connection, event))

    def delete(self, answer_id: str, rater: str) -> Future[int]:
        """What this rater said about an answer, and what nobody speaks of any more; how many opinions went."""
        return self.submit(lambda connection: _delete(connection, answer_id, rater))

    def note_export(self, count: int) -> Future[None]:
        """A line in the audit table."""
        return self.submit(lambda connection: _audit(connection, "export", count))

    def submit(self, work: Callable[[sqlite3.Connection], Any]) -> Future[Any]:
        """Run in the writer's thread, inside one transaction."""
        future: Future[Any] = Future()
        job = _Job(work, time.monotonic() + self._give_up_s, future)
        try:
            if self._is_closed:
                raise FeedbackUnavailable("the store is closed")
            self._jobs.put_nowait(job)
        except queue.Full:
            future.set_exception(FeedbackUnavailable(f"{MAX_WAITING} writes wait already"))
        except FeedbackUnavailable as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """After what waits is written."""
        if not self._is_closed:
            self._is_closed = True
            self._jobs.put(None)
            self._thread.join()
            self._connection.close()

    # The writer's thread

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(self._transact(job))
            except FeedbackUnavailable as error:
                job.future.set_exception(error)
            except Exception as error:  # a fault of ours: the caller hears of it, the next write goes on
                logger.exception("a feedback write failed")
                job.future.set_exception(error)

    def _transact(self, job: _Job) -> Any:
        while True:
            try:
                return self._once(job)
            except sqlite3.IntegrityError:
                raise
            except sqlite3.ProgrammingError as error:  # it could not be opened again; perhaps now
                self._open_again()
                raise FeedbackUnavailable(str(error)) from error
            except sqlite3.DatabaseError as error:
                text = str(error)
                if ("locked" in text or "busy" in text) and time.monotonic() < job.due:
                    time.sleep(0.02)
                    continue
                logger.warning("feedback was not stored: %s", text)
                if "I/O" in text or "malformed" in text:
                    self._open_again()
                raise FeedbackUnavailable(text) from error

    def _once(self, job: _Job) -> Any:
        left = max(0.0, min(self._busy_timeout_s, job.due - time.monotonic()))
        self._connection.execute(f"PRAGMA busy_timeout = {int(left * 1000)}")
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = job.work(self._connection)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # some errors have rolled it back already
                self._connection.execute("ROLLBACK")
            raise
        return result

    def _open_again(self) -> None:
        """After an error of the disk; closed first: closing any handle drops the process's locks."""
        self._connection.close()
        try:
            self._connection = open_for_writing(self.path, self._busy_timeout_s)
        except Exception as error:
            logger.warning("the feedback file cannot be opened again: %s", error)


def _save(connection: sqlite3.Connection, event: Event) -> Saved:
    _put_conversation(connection, event.conversation)
    for answer in event.answers:
        _put_answer(connection, answer)
    return _put_opinion(connection, event.opinion)


def _put_conversation(connection: sqlite3.Connection, conversation: Conversation) -> None:
    connection.execute(
        "INSERT INTO conversation (id, created_at, key_name, language, system) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (id) DO NOTHING",
        (conversation.id, conversation.created_at, conversation.key_name, conversation.language, conversation.system),
    )


def _put_answer(connection: sqlite3.Connection, answer: Answer) -> None:
    """The first that is told of an answer stays; its parent is named only where it is stored too."""
    values: dict[str, object] = {
        "id": answer.id,
        "conversation_id": answer.conversation_id,
        "round": answer.round,
        "variant": answer.variant,
        "request_id": answer.request_id,
        "model": answer.model,
        "fingerprint": answer.fingerprint,
        "messages_json": json.dumps(answer.messages, ensure_ascii=False),
        "prompt_ids_sha256": answer.prompt_hash,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "sampling_json": json.dumps(answer.sampling, ensure_ascii=False, sort_keys=True),
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "latency_ms": max(0, answer.latency_ms),
        "created_at": answer.created_at,
    }
    names, marks = ", ".join(values), ", ".join("?" * len(values))
    connection.execute(
        f"INSERT INTO answer (parent_id, {names}) VALUES ((SELECT id FROM answer WHERE id = ?), {marks})"
        " ON CONFLICT (id) DO NOTHING",
        (answer.parent_id, *values.values()),
    )


def _put_opinion(connection: sqlite3.Connection, opinion: Opinion) -> Saved:
    fresh, now = uuid7(), now_ms()
    row = connection.execute(
        "INSERT INTO feedback (id, answer_id, rater, thumb, rating, correction, preferred_over, tags_json, comment,"
        " created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (answer_id, rater) DO UPDATE SET thumb = excluded.thumb, rating = excluded.rating,"
        " correction = excluded.correction, preferred_over = excluded.preferred_over, tags_json = excluded.tags_json,"
        " comment = excluded.comment, updated_at = max(excluded.updated_at, updated_at) RETURNING id",
        (
            fresh,
            opinion.answer_id,
            opinion.rater,
            opinion.thumb,
            opinion.rating,
            opinion.correction,
            opinion.preferred_over,
            json.dumps(list(opinion.tags), ensure_ascii=False),
            opinion.comment,
            now,
            now,
        ),
    ).fetchone()
    return Saved(row[0], row[0] == fresh)


def _delete(connection: sqlite3.Connection, answer_id: str, rater: str) -> int:
    gone = connection.execute("DELETE FROM feedback WHERE answer_id = ? AND rater = ?", (answer_id, rater)).rowcount
    if gone:
        connection.execute(
            "DELETE FROM answer WHERE id NOT IN (SELECT answer_id FROM feedback)"
            " AND id NOT IN (SELECT preferred_over FROM feedback WHERE preferred_over IS NOT NULL)"
            " AND conversation_id = (SELECT conversation_id FROM answer WHERE id = ?)",
            (answer_id,),
        )
        connection.execute("DELETE FROM conversation WHERE id NOT IN (SELECT conversation_id FROM answer)")
        _audit(connection, "delete", gone)
    return gone


def _audit(connection: sqlite3.Connection, action: str, count: int) -> None:
    connection.execute("INSERT INTO audit (at, action, count) VALUES (?, ?, ?)", (now_ms(), action, count))
