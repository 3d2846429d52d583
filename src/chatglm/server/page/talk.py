"""Talk: one saved conversation, as the browser keeps it and sends it along.

The server keeps none of it. What comes from a browser is checked here before anything else sees it.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..api_errors import APIError
from ..feedback.ids import now_ms, uuid7

MAX_TEXT = 1 << 18
TITLE_LENGTH = 24


class _Kept(BaseModel):
    model_config = ConfigDict(extra="ignore", validate_assignment=False)


class Opinion(_Kept):
    """What the reader said about an answer; a copy of what is in the feedback store."""

    thumb: int | None = None
    rating: int | None = None
    correction: str | None = Field(default=None, max_length=MAX_TEXT)
    preferred_over: str | None = None
    tags: list[str] = Field(default_factory=list, max_length=16)
    comment: str | None = Field(default=None, max_length=MAX_TEXT)


class Variant(_Kept):
    """One answer to a question. Regenerating adds another; none is lost.

    system  the system text that it was asked with
    """

    id: str = Field(default_factory=uuid7, max_length=64)
    text: str = Field(default="", max_length=MAX_TEXT)
    system: str = Field(default="", max_length=MAX_TEXT)
    finish: str = ""
    error: str | None = None
    request_id: str = ""
    model: str = ""
    fingerprint: str = ""
    prompt_hash: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dropped_rounds: int = 0
    latency_ms: int = 0
    tokens_per_s: float = 0.0
    created_at: int = 0
    sampling: dict[str, Any] = Field(default_factory=dict)
    opinion: Opinion | None = None


class Round(_Kept):
    """A question and its answers; `chosen` is the one that is shown and that later questions build on."""

    question: str = Field(max_length=MAX_TEXT)
    variants: list[Variant] = Field(default_factory=list, max_length=64)
    chosen: int = 0

    @property
    def answer(self) -> Variant | None:
        """The chosen variant."""
        return self.variants[max(0, min(self.chosen, len(self.variants) - 1))] if self.variants else None


class Talk(_Kept):
    """Rounds oldest first."""

    id: str = Field(default_factory=uuid7, max_length=64)
    title: str = Field(default="", max_length=256)
    is_named: bool = False
    created_at: int = Field(default_factory=now_ms)
    system: str = Field(default="", max_length=MAX_TEXT)
    rounds: list[Round] = Field(default_factory=list, max_length=512)

    def add_question(self, question: str) -> Round:
        """A new round at the end; the first question names the conversation."""
        if not self.is_named and not self.rounds:
            self.title = " ".join(question.split())[:TITLE_LENGTH]
        self.rounds.append(Round(question=question))
        return self.rounds[-1]

    def fork(self, number: int, question: str) -> Talk:
        """A new conversation that is this one up to round `number`, which asks `question` instead."""
        kept = [round.model_copy(deep=True) for round in self.rounds[:number]]
        for round in kept:
            for variant in round.variants:
                variant.id, variant.opinion = uuid7(), None  # what was said is about the answers of the other one
        forked = Talk(system=self.system, rounds=kept)
        if kept or self.is_named:
            forked.title, forked.is_named = numbered(self.title), self.is_named
        forked.add_question(question)
        return forked

    def messages_of(self, number: int, system: str) -> list[dict[str, str]]:
        """What the API is asked for round `number`: system text, earlier rounds that have an answer, the question."""
        found = [{"role": "system", "content": system}] if system.strip() else []
        for round in self.rounds[:number]:
            if round.answer is not None and round.answer.error is None:
                found.append({"role": "user", "content": round.question})
                found.append({"role": "assistant", "content": round.answer.text})
        found.append({"role": "user", "content": self.rounds[number].question})
        return found


def numbered(title: str) -> str:
    """`title` → `title (2)` → `title (3)`."""
    found = re.fullmatch(r"(.*) \((\d{1,4})\)", title, re.DOTALL)
    return f"{found[1]} ({int(found[2]) + 1})" if found else f"{title} (2)"


def read_talk(text: str | None) -> Talk:
    """From the browser. Raises APIError 400 for what no page of ours has written."""
    if not text:
        return Talk()
    try:
        return Talk.model_validate_json(text)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise APIError(
            400, "invalid_value", f"the saved conversation cannot be read ({place[:64]})", param="talk"
        ) from None
