"""Rows out of one or several feedback files, in one order whatever the order of the files."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RequestError
from .schema import open_for_reading


@dataclass(frozen=True)
class Row:
    """One opinion with the answer it is about, and the answer that it was preferred over."""

    id: str
    rater: str
    thumb: int | None
    rating: int | None
    correction: str | None
    tags: list[str]
    comment: str | None
    created_at: int
    updated_at: int
    answer: StoredAnswer
    worse: StoredAnswer | None


@dataclass(frozen=True)
class StoredAnswer:
    """As the table `answer` has it, with its conversation's facts."""

    id: str
    conversation_id: str
    key_name: str | None
    language: str
    round: int
    variant: int
    request_id: str
    model: str
    fingerprint: str
    messages: list[dict[str, str]]
    prompt_hash: str
    text: str
    finish_reason: str
    sampling: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    latency_ms: int
    created_at: int


_ANSWERS = "SELECT answer.*, key_name, language FROM answer JOIN conversation ON conversation.id = conversation_id"


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Every opinion of the files; the same id in two files is taken once, as it was said last.

    Each file is read in one transaction, so a server may go on writing. Raises RequestError for a file that is none.
    """
    found: dict[str, Row] = {}
    for path in paths:
        connection = open_for_reading(path)
        try:
            connection.execute("BEGIN")
            answers = {row["id"]: _answer(row) for row in connection.execute(_ANSWERS)}
            for row in connection.execute("SELECT * FROM feedback"):
                made = _row(row, answers)
                if made.id not in found or found[made.id].updated_at < made.updated_at:
                    found[made.id] = made
        except sqlite3.DatabaseError as error:
            raise RequestError(f"{path}: the feedback cannot be read ({error})") from error
        finally:
            connection.close()
    return sorted(found.values(), key=lambda row: (row.answer.created_at, row.answer.id, row.rater, row.id))


def _answer(row: sqlite3.Row) -> StoredAnswer:
    return StoredAnswer(
        messages=json.loads(row["messages_json"]),
        sampling=json.loads(row["sampling_json"]),
        prompt_hash=row["prompt_ids_sha256"],
        **{
            name: row[name]
            for name in StoredAnswer.__dataclass_fields__
            if name not in ("messages", "sampling", "prompt_hash")
        },
    )


def _row(row: sqlite3.Row, answers: dict[str, StoredAnswer]) -> Row:
    plain = ("id", "rater", "thumb", "rating", "correction", "comment", "created_at", "updated_at")
    return Row(
        **{name: row[name] for name in plain},
        tags=json.loads(row["tags_json"]),
        answer=answers[row["answer_id"]],
        worse=answers.get(row["preferred_over"]),
    )
