"""What `POST /v1/feedback` takes. Answers are not kept by the server, so the body brings the one that it speaks of."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..schemas import Body, Message, Whole, refuse
from .ids import ID, now_ms, uuid7
from .records import MAX_TEXT_BYTES, Answer, Conversation, Event, Opinion

MOST = 2**53


def _is_id(value: str | None) -> str | None:
    if value is not None and not ID.match(value):
        raise refuse("must be a UUID in lower case")
    return value


def _is_short(value: Any) -> Any:
    if isinstance(value, str) and len(value.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
        raise refuse(f"is longer than {MAX_TEXT_BYTES:,} bytes")
    return value


class ConversationBody(Body):
    """Where the answer was given."""

    id: str = Field(default_factory=uuid7)
    created_at: Whole = Field(default_factory=now_ms, ge=0, le=MOST)
    language: str = Field(default="", max_length=16)

    _id = field_validator("id")(_is_id)


class AnswerBody(Body):
    """An answer of this server, as its client saw it."""

    id: str = Field(default_factory=uuid7)
    parent_id: str | None = None
    round: Whole = Field(default=0, ge=0, le=10_000)
    variant: Whole = Field(default=0, ge=0, le=10_000)
    request_id: str = Field(default="", max_length=128)
    model: str = Field(default="", max_length=256)
    fingerprint: str = Field(default="", max_length=128)
    messages: list[Message] = Field(min_length=1, max_length=512)
    prompt_ids_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    text: str
    finish_reason: str = Field(default="", max_length=32)
    sampling: dict[str, Any] = Field(default_factory=dict, max_length=64)
    prompt_tokens: Whole = Field(default=0, ge=0, le=MOST)
    completion_tokens: Whole = Field(default=0, ge=0, le=MOST)
    latency_ms: Whole = Field(default=0, ge=0, le=MOST)
    created_at: Whole = Field(default_factory=now_ms, ge=0, le=MOST)

    _ids = field_validator("id", "parent_id")(_is_id)
    _texts = field_validator("text")(_is_short)

    @field_validator("messages")
    @classmethod
    def check_messages(cls, value: list[Message]) -> list[Message]:
        if value[-1].role not in ("user", "tool"):
            raise refuse("must end with the question that was answered")
        for message in value:
            _is_short(message.content)
        return value

    def record(self, conversation_id: str, prompt_hash: str) -> Answer:
        """For the store."""
        plain = self.model_dump(exclude={"messages", "prompt_ids_sha256"})
        messages = [{"role": message.role, "content": message.content or ""} for message in self.messages]
        return Answer(**plain, conversation_id=conversation_id, messages=messages, prompt_hash=prompt_hash)


class FeedbackBody(Body):
    """One rater's opinion of one answer; the same answer and rater again replaces it."""

    conversation: ConversationBody = Field(default_factory=ConversationBody)
    answer: AnswerBody
    preferred_over: AnswerBody | None = Field(
        default=None, description="another answer to the same messages that is worse"
    )
    thumb: Literal[-1, 1] | None = None
    rating: Whole | None = Field(default=None, ge=1, le=5)
    correction: str | None = Field(default=None, min_length=1)
    tags: list[Literal["wrong", "unsafe", "off_topic", "language", "other"]] = Field(default_factory=list, max_length=5)
    comment: str | None = None
    rater: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,64}$")

    _texts = field_validator("correction", "comment")(_is_short)

    @model_validator(mode="after")
    def check_opinion(self) -> FeedbackBody:
        if all(given is None for given in (self.thumb, self.rating, self.correction, self.preferred_over)):
            raise refuse("at least one of thumb, rating, correction and preferred_over must be given", "missing_field")
        if self.preferred_over is not None and self.preferred_over.id == self.answer.id:
            raise refuse("preferred_over is the answer itself")
        return self

    def event(self, *, rater: str, key_name: str | None, prompt_hash: str) -> Event:
        """For the store."""
        system = "\n".join(m.content or "" for m in self.answer.messages if m.role in ("system", "developer")) or None
        talk = self.conversation
        answers = [self.answer.record(talk.id, prompt_hash)]
        if self.preferred_over is not None:
            answers.append(self.preferred_over.record(talk.id, prompt_hash))
        opinion = Opinion(
            self.answer.id,
            rater,
            self.thumb,
            self.rating,
            self.correction,
            self.preferred_over.id if self.preferred_over is not None else None,
            tuple(self.tags),
            self.comment,
        )
        return Event(Conversation(talk.id, talk.created_at, key_name, talk.language, system), tuple(answers), opinion)
