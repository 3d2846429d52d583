"""What goes into the feedback store, in three parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TAGS = ("wrong", "unsafe", "off_topic", "language", "other")
MAX_TEXT_BYTES = 64 << 10
"""Of each text, in UTF-8."""


@dataclass(frozen=True)
class Conversation:
    """Where an answer was given. created_at: UTC milliseconds."""

    id: str
    created_at: int
    key_name: str | None = None
    language: str = ""
    system: str | None = None


@dataclass(frozen=True)
class Answer:
    """One answer with everything that is needed to make it again.

    messages     what was sent, [{role, content}, …], the question last
    prompt_hash  sha256 of the context's ids: answers with the same one can be compared
    sampling     all parameters, the seed too
    """

    id: str
    conversation_id: str
    messages: list[dict[str, str]]
    text: str
    model: str
    created_at: int
    parent_id: str | None = None
    round: int = 0
    variant: int = 0
    request_id: str = ""
    fingerprint: str = ""
    prompt_hash: str = ""
    finish_reason: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_ms: int = 0


@dataclass(frozen=True)
class Opinion:
    """What one rater says about one answer; saying it again replaces it.

    rater           a random id of a browser, or the name of a key
    preferred_over  id of another answer to the same question
    """

    answer_id: str
    rater: str
    thumb: int | None = None
    rating: int | None = None
    correction: str | None = None
    preferred_over: str | None = None
    tags: tuple[str, ...] = ()
    comment: str | None = None

    @property
    def kinds(self) -> list[str]:
        """Names for the metric."""
        thumbs = {1: ["thumb_up"], -1: ["thumb_down"]}
        found = thumbs.get(self.thumb or 0, [])
        return [*found, *(k for k in ("rating", "correction", "preferred_over") if getattr(self, k) is not None)]


@dataclass(frozen=True)
class Event:
    """One transaction: the opinion, the answers it speaks of, their conversation."""

    conversation: Conversation
    answers: tuple[Answer, ...]
    opinion: Opinion
