"""From a conversation and the rating controls to what the feedback store keeps."""

from __future__ import annotations

from typing import Any

from ..api_errors import APIError
from ..feedback.ids import ID
from ..feedback.records import MAX_TEXT_BYTES, TAGS, Answer, Conversation, Event
from ..feedback.records import Opinion as Record
from .talk import Opinion, Round, Talk, Variant


def read_opinion(thumb: Any, rating: Any, correction: Any, tags: Any, comment: Any) -> Opinion:
    """From the controls; empty texts are none. Raises APIError 400 for what the controls cannot give."""
    found = Opinion(
        thumb=thumb if thumb in (1, -1) else None,
        rating=int(rating) if rating in (1, 2, 3, 4, 5) else None,
        correction=str(correction).strip() or None if correction else None,
        tags=[tag for tag in TAGS if isinstance(tags, list) and tag in tags],
        comment=str(comment).strip() or None if comment else None,
    )
    for name, text in (("correction", found.correction), ("comment", found.comment)):
        _check_length(name, text)
    return found


def is_empty(opinion: Opinion) -> bool:
    """Whether it says nothing that the store would take."""
    given = (opinion.thumb, opinion.rating, opinion.correction, opinion.preferred_over)
    return all(value is None for value in given)


def event_of(talk: Talk, number: int, opinion: Opinion, *, rater: str, key_name: str | None, language: str) -> Event:
    """What is stored: the answer of round `number`, the one it is preferred over, the messages that were sent.

    Raises APIError 400 where ids or texts are not what this page makes.
    """
    round = talk.rounds[number]
    answer = round.answer
    worse = next((variant for variant in round.variants if variant.id == opinion.preferred_over), None)
    if answer is None or not ID.match(answer.id) or not ID.match(talk.id) or (worse and not ID.match(worse.id)):
        raise APIError(400, "invalid_value", "the conversation has an id that is none", param="talk")
    parent = talk.rounds[number - 1].answer if number else None
    about = [_record(talk, round, number, variant, parent) for variant in (answer, worse) if variant]
    return Event(
        Conversation(talk.id, talk.created_at, key_name, language, answer.system or None),
        tuple(about),
        Record(
            answer.id,
            rater,
            opinion.thumb,
            opinion.rating,
            opinion.correction,
            worse.id if worse else None,
            tuple(opinion.tags),
            opinion.comment,
        ),
    )


def _record(talk: Talk, round: Round, number: int, variant: Variant, parent: Variant | None) -> Answer:
    messages = talk.messages_of(number, variant.system)
    for message in messages:
        _check_length("messages", message["content"])
    _check_length("text", variant.text)
    return Answer(
        id=variant.id,
        conversation_id=talk.id,
        messages=messages,
        text=variant.text,
        model=variant.model[:256],
        created_at=variant.created_at,
        parent_id=parent.id if parent else None,
        round=number,
        variant=round.variants.index(variant),
        request_id=variant.request_id[:128],
        fingerprint=variant.fingerprint[:128],
        prompt_hash=variant.prompt_hash[:64],
        finish_reason=variant.finish[:32],
        sampling=variant.sampling,
        prompt_tokens=variant.prompt_tokens,
        completion_tokens=variant.completion_tokens,
        latency_ms=variant.latency_ms,
    )


def _check_length(name: str, text: str | None) -> None:
    if text is not None and len(text.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
        raise APIError(400, "invalid_value", f"`{name}` is longer than {MAX_TEXT_BYTES:,} bytes", param=name)
