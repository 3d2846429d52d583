"""Feedback as training data: what is exported, in which form. docs/feedback.md states the rules.

The same rows give the same text, byte for byte.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import RequestError
from .preferences import Conflict, corrected_or_liked, preference_pairs
from .reading import Row
from .redaction import redacted

FORMATS = ("pairs", "sft", "jsonl", "csv")


@dataclass(frozen=True)
class Filters:
    """since: UTC milliseconds of the last change. min_rating: see docs/feedback.md."""

    since: int | None = None
    model: str | None = None
    min_rating: int | None = None
    redact: bool = False


@dataclass(frozen=True)
class Exported:
    """count: lines of data. conflicts: what was left out because raters disagree."""

    text: str
    count: int
    read: int
    by_source: dict[str, int] = field(default_factory=dict)
    conflicts: tuple[Conflict, ...] = ()


def parse_time(text: str) -> int:
    """UTC milliseconds from `2026-01-31` or an ISO time. Raises RequestError."""
    try:
        found = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise RequestError(f"since is {text[:40]!r}; it must be a date like 2026-01-31 or 2026-01-31T12:00") from None
    if found.tzinfo is None:
        found = found.replace(tzinfo=datetime.timezone.utc)
    return round(found.timestamp() * 1000)


def export(rows: Sequence[Row], form: str, filters: Filters) -> Exported:
    """The rows that pass the filters, in one of FORMATS."""
    kept = [row for row in rows if _passes(row, filters)]
    conflicts: list[Conflict] = []
    if form == "pairs":
        lines, conflicts = preference_pairs(kept, filters.min_rating)
    elif form == "sft":
        lines, conflicts = corrected_or_liked(kept, filters.min_rating)
    else:
        least = filters.min_rating
        lines = [whole_row(row) for row in kept if least is None or (row.rating is not None and row.rating >= least)]
    if filters.redact:
        lines = redacted(lines)
    sources: dict[str, int] = {}
    for line in lines:
        if "source" in line:
            sources[line["source"]] = sources.get(line["source"], 0) + 1
    write: Callable[[Iterable[dict[str, Any]]], str] = as_csv if form == "csv" else as_jsonl
    return Exported(write(lines), len(lines), len(kept), dict(sorted(sources.items())), tuple(conflicts))


def _passes(row: Row, filters: Filters) -> bool:
    is_late = filters.since is None or row.updated_at >= filters.since
    return is_late and filters.model in (None, row.answer.model)


def whole_row(row: Row) -> dict[str, Any]:
    """Everything that is stored about an opinion."""
    answer = row.answer
    return {
        "id": row.id,
        "answer_id": answer.id,
        "conversation_id": answer.conversation_id,
        "rater": row.rater,
        "key_name": answer.key_name,
        "language": answer.language,
        "thumb": row.thumb,
        "rating": row.rating,
        "correction": row.correction,
        "preferred_over": row.worse.id if row.worse else None,
        "tags": row.tags,
        "comment": row.comment,
        "messages": answer.messages,
        "answer": answer.text,
        "score": row.thumb,
        "model": answer.model,
        "fingerprint": answer.fingerprint,
        "prompt_ids_sha256": answer.prompt_hash,
        "round": answer.round,
        "variant": answer.variant,
        "request_id": answer.request_id,
        "finish_reason": answer.finish_reason,
        "sampling": answer.sampling,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "latency_ms": answer.latency_ms,
        "answered_at": answer.created_at,
        "created_at": row.created_at,
        "updated_at": row.updated_at,
    }


def as_jsonl(lines: Iterable[dict[str, Any]]) -> str:
    """One object a line, UTF-8 as it is."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def as_csv(lines: Iterable[dict[str, Any]]) -> str:
    """Lists and objects as JSON in their cell; a text that would run as a formula gets a quote before it."""
    out = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for line in lines:
        if writer is None:
            writer = csv.DictWriter(out, fieldnames=list(line), lineterminator="\r\n")
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in line.items()})
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value
