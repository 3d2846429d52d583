"""Thumbs, ratings, corrections and preferences: asked for consent first, stored at once, changeable, deletable."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..api_errors import APIError
from ..backend import Backend, Owner
from .controls import rated_answer, rated_round, rating_controls
from .events import Events, Shown, given_talk, given_text, message_number, owner_of
from .layout import Parts
from .opinions import event_of, is_empty, read_opinion
from .rendering import thumbs
from .talk import Opinion, Talk
from .words import error_text, word


class Ratings:
    """What the rating controls do. Nothing is stored without an action and without consent."""

    def __init__(self, backend: Backend, parts: Parts, events: Events) -> None:
        self._backend, self._parts, self._events = backend, parts, events

    async def like(
        self,
        event: gr.LikeData,
        request: gr.Request,
        text: str,
        rated: Any,
        language: str,
        rater: str,
        consent: bool,
    ) -> Shown:
        """A thumb at a message; pressed without consent, it asks for that and stores nothing."""
        talk = given_talk(text)
        if self._events.is_busy(request):
            return {**self._thumbs(talk), **self._say(word("busy", language))}
        number = message_number(event.index) // 2
        thumb = {"True": 1, "Like": 1, "False": -1, "Dislike": -1}.get(str(event.liked))
        if thumb is None or not 0 <= number < len(talk.rounds):
            return {}
        answer = talk.rounds[number].answer
        given = (answer.opinion if answer else None) or Opinion()
        opinion = given.model_copy(update={"thumb": thumb})
        shown = await self._store(talk, number, opinion, request, language, rater, consent)
        return {**self._turned_to(talk, number, rated, language), self._parts.thumb: thumb, **shown}

    async def save(
        self, request: gr.Request, text: str, rated: Any, language: str, rater: str, consent: bool, *given: Any
    ) -> Shown:
        """The controls, for the rated answer."""
        self._events.check_free(request, language)
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

    async def prefer(
        self, request: gr.Request, text: str, rated: Any, language: str, rater: str, consent: bool
    ) -> Shown:
        """The shown variant of the last answer is better than the one before it (or after, for the first)."""
        self._events.check_free(request, language)
        talk = given_talk(text)
        last = talk.rounds[-1] if talk.rounds else None
        if last is None or last.answer is None or len(last.variants) < 2:
            return {}
        at = last.variants.index(last.answer)
        worse = last.variants[at - 1] if at else last.variants[1]
        given = last.answer.opinion or Opinion()
        opinion = given.model_copy(update={"preferred_over": worse.id})
        number = len(talk.rounds) - 1
        shown = await self._store(talk, number, opinion, request, language, rater, consent)
        return {**self._turned_to(talk, number, rated, language), **shown}

    async def delete(self, request: gr.Request, text: str, rated: Any, language: str, rater: str) -> Shown:
        """Take back what was said about the rated answer."""
        self._events.check_free(request, language)
        talk = given_talk(text)
        number = rated_round(talk, rated)
        keeper = self._backend.feedback
        answer = talk.rounds[number].answer if number is not None else None
        if keeper is None or answer is None:
            return self._say(word("needs_answer", language))
        try:
            with self._events.working(request):
                await keeper.delete(answer.id, rater_of(owner_of(request), rater))
        except APIError as error:
            return self._say(f"⚠ {error_text(error.code, error.message, language)}")
        answer.opinion = None
        emptied = rating_controls(self._parts, talk, number, language)
        return {**self._after(talk, number, language), **emptied, **self._say(word("deleted", language))}

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
        if consent is not True:
            opened = {self._parts.rated: number, self._parts.feedback: gr.update(open=True)}
            return {**opened, **self._say(f"**{word('needs_consent', language)}**")}
        try:
            owner = owner_of(request)
            who = rater_of(owner, rater)
            event = event_of(talk, number, opinion, rater=who, key_name=owner.key_name, language=language)
            with self._events.working(request):
                await keeper.save(event)
        except APIError as error:
            return self._say(f"⚠ {error_text(error.code, error.message, language)}")
        answer.opinion = opinion
        return {**self._after(talk, number, language), **self._say(word("saved", language))}

    def _after(self, talk: Talk, number: int | None, language: str) -> Shown:
        shown = self._events.show_answer(talk, language)
        return {**shown, self._parts.rated: number, **rated_answer(self._parts, talk, number, language)}

    def _turned_to(self, talk: Talk, number: int, rated: Any, language: str) -> Shown:
        """The controls for round `number`, where they were about another one; else what is in them stays."""
        if rated_round(talk, rated) == number:
            return {}
        return rating_controls(self._parts, talk, number, language)

    def _thumbs(self, talk: Talk) -> Shown:
        return {self._parts.chat: gr.update(feedback_value=thumbs(talk))}

    def _say(self, text: str) -> Shown:
        return {self._parts.feedback_status: text}


def rater_of(owner: Owner, given: str) -> str:
    """A browser's random id, or the key's name where the browser keeps none."""
    given = given_text(given)
    is_right = given.startswith("browser-") and given.isascii() and len(given) <= 64
    return given if is_right else owner.key_name or "unknown"
