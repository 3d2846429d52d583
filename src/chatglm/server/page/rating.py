"""Thumbs, ratings, corrections and preferences: asked for consent first, stored at once, changeable, deletable."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..api_errors import APIError
from ..backend import Backend, Owner
from .events import Events, Shown, given_talk, message_number, owner_of
from .layout import Parts
from .opinions import event_of, is_empty, read_opinion
from .talk import Opinion, Talk
from .words import error_text, word


class Ratings:
    """What the rating controls do. Nothing is stored without an action and without consent."""

    def __init__(self, backend: Backend, parts: Parts, events: Events) -> None:
        self._backend, self._parts, self._events = backend, parts, events

    async def show(self, text: str, rated: Any, language: str) -> Shown:
        """The controls as they stand for the rated answer, or empty."""
        parts = self._parts
        talk = given_talk(text)
        number = rated_round(talk, rated)
        answer = talk.rounds[number].answer if number is not None else None
        opinion = (answer.opinion if answer else None) or Opinion()
        where = word("rated", language, number=number + 1, count=len(talk.rounds)) if number is not None else ""
        return {
            parts.feedback_place: where,
            parts.thumb: opinion.thumb,
            parts.rating: opinion.rating,
            parts.correction: opinion.correction or "",
            parts.tags: opinion.tags,
            parts.comment: opinion.comment or "",
            parts.delete_feedback: gr.update(interactive=answer is not None and answer.opinion is not None),
        }

    async def like(
        self, event: gr.LikeData, request: gr.Request, text: str, language: str, rater: str, consent: bool
    ) -> Shown:
        """A thumb at a message; pressed without consent, it asks for that and stores nothing."""
        talk = given_talk(text)
        number = message_number(event.index) // 2
        thumb = {True: 1, "Like": 1, False: -1, "Dislike": -1}.get(event.liked)
        if thumb is None or not 0 <= number < len(talk.rounds):
            return {}
        answer = talk.rounds[number].answer
        given = (answer.opinion if answer else None) or Opinion()
        return await self._store(
            talk, number, given.model_copy(update={"thumb": thumb}), request, language, rater, consent
        )

    async def save(
        self, request: gr.Request, text: str, rated: Any, language: str, rater: str, consent: bool, *given: Any
    ) -> Shown:
        """The controls, for the rated answer."""
        talk = given_talk(text)
        number = rated_round(talk, rated)
        if number is None:
            return self._say(word("needs_answer", language))
        try:
            opinion = read_opinion(*given)
        except APIError as error:
            return self._say(f"⚠ {error.message}")
        answer = talk.rounds[number].answer
        if answer is not None and answer.opinion is not None:
            opinion.preferred_over = answer.opinion.preferred_over
        return await self._store(talk, number, opinion, request, language, rater, consent)

    async def prefer(self, request: gr.Request, text: str, language: str, rater: str, consent: bool) -> Shown:
        """The shown variant of the last answer is better than the one before it (or after, for the first)."""
        talk = given_talk(text)
        last = talk.rounds[-1] if talk.rounds else None
        if last is None or last.answer is None or len(last.variants) < 2:
            return {}
        at = last.variants.index(last.answer)
        worse = last.variants[at - 1] if at else last.variants[1]
        given = last.answer.opinion or Opinion()
        opinion = given.model_copy(update={"preferred_over": worse.id})
        return await self._store(talk, len(talk.rounds) - 1, opinion, request, language, rater, consent)

    async def delete(self, request: gr.Request, text: str, rated: Any, language: str, rater: str) -> Shown:
        """Take back what was said about the rated answer."""
        talk = given_talk(text)
        number = rated_round(talk, rated)
        keeper = self._backend.feedback
        answer = talk.rounds[number].answer if number is not None else None
        if keeper is None or answer is None:
            return self._say(word("needs_answer", language))
        try:
            await keeper.delete(answer.id, rater_of(owner_of(request), rater))
        except APIError as error:
            return self._say(f"⚠ {error_text(error.code, error.message, language)}")
        answer.opinion = None
        return {**self._after(talk, number, language), **self._say(word("deleted", language))}

    async def _store(
        self, talk: Talk, number: int, opinion: Opinion, request: gr.Request, language: str, rater: str, consent: bool
    ) -> Shown:
        keeper = self._backend.feedback
        answer = talk.rounds[number].answer
        if keeper is None:
            return self._say(word("no_store", language))
        if answer is None or answer.error is not None:
            return self._say(word("needs_answer", language))
        if is_empty(opinion):
            return self._say(word("needs_opinion", language))
        if not consent:
            shown = {self._parts.rated: number, self._parts.feedback: gr.update(open=True)}
            return {**shown, self._parts.thumb: opinion.thumb, **self._say(f"**{word('needs_consent', language)}**")}
        try:
            owner = owner_of(request)
            who = rater_of(owner, rater)
            await keeper.save(event_of(talk, number, opinion, rater=who, key_name=owner.key_name, language=language))
        except APIError as error:
            return self._say(f"⚠ {error_text(error.code, error.message, language)}")
        answer.opinion = opinion
        return {**self._after(talk, number, language), **self._say(word("saved", language))}

    def _after(self, talk: Talk, number: int | None, language: str) -> Shown:
        shown = self._events.show(talk, language)
        return {**shown, self._parts.rated: number}

    def _say(self, text: str) -> Shown:
        return {self._parts.feedback_status: text}


def rated_round(talk: Talk, rated: Any) -> int | None:
    """The round that is being rated; the last where none was picked, None where there is no answer."""
    if not talk.rounds:
        return None
    number = int(rated) if isinstance(rated, int | float) and 0 <= rated < len(talk.rounds) else len(talk.rounds) - 1
    return number if talk.rounds[number].answer is not None else None


def rater_of(owner: Owner, given: str) -> str:
    """A browser's random id, or the key's name where the browser keeps none."""
    is_right = given.startswith("browser-") and given.isascii() and len(given) <= 64
    return given if is_right else owner.key_name or "unknown"
