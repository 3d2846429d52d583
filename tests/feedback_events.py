"""Events for the feedback store, made short."""

from __future__ import annotations

import itertools
import sqlite3
from pathlib import Path
from typing import Any

from chatglm.server.feedback.records import Answer, Conversation, Event, Opinion

_numbers = itertools.count(1)


def identity(name: str) -> str:
    """A UUID that spells a name."""
    digits = name.encode().hex()[:32].ljust(32, "0")
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def answer(name: str, *, question: str = "q", text: str | None = None, **more: Any) -> Answer:
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": question}],
        "text": f"text of {name}" if text is None else text,
        "model": "chatglm",
        "created_at": 1_700_000_000_000 + next(_numbers),
        "prompt_hash": f"hash of {question}",
        "sampling": {"temperature": 0.5, "seed": 7},
    }
    return Answer(id=identity(name), conversation_id=identity("talk"), **{**fields, **more})


def event(given: Answer, *others: Answer, rater: str = "ann", **opinion: Any) -> Event:
    if not opinion:
        opinion = {"thumb": 1}
    return Event(
        Conversation(identity("talk"), 1, language="en"), (*others, given), Opinion(given.id, rater, **opinion)
    )


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()
