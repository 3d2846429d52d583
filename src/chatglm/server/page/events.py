"""What happens when something is pressed: each event takes the conversation from the browser and gives it back."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ..api_errors import APIError
from ..backend import Backend, Owner
from ..logs import RequestLog
from .answering import LiveAnswers, answer, no_owner
from .layout import SAMPLING, Parts
from .rendering import messages, status_line, thumbs, typed
from .talk import Talk, Variant, read_talk
from .words import error_text, word

Shown = dict[Any, Any]
"""New values by component; those that are missing stay."""


class Events:
    """The page's behaviour over a backend."""

    def __init__(self, backend: Backend, parts: Parts, live: LiveAnswers, log: RequestLog) -> None:
        self._backend, self._parts, self._live, self._log = backend, parts, live, log

    # Showing

    def show(self, talk: Talk, language: str) -> Shown:
        """Everything that follows from the conversation."""
        parts = self._parts
        last = talk.rounds[-1] if talk.rounds else None
        count = len(last.variants) if last is not None else 0
        has_choice = count > 1
        number = min(last.chosen, count - 1) + 1 if last is not None and count else 0
        return {
            parts.talk: talk.model_dump_json(),
            parts.rated: None,
            parts.chat: gr.update(value=messages(talk, language), feedback_value=thumbs(talk)),
            parts.status: status_line(last.answer if last else None, self._backend.context, language),
            parts.system: talk.system,
            parts.name: talk.title,
            parts.regenerate: gr.update(interactive=last is not None),
            parts.undo: gr.update(interactive=last is not None),
            parts.previous: gr.update(visible=has_choice, interactive=number > 1),
            parts.next: gr.update(visible=has_choice, interactive=number < count),
            parts.place: gr.update(visible=has_choice, value=f"{number} / {count}"),
            parts.prefer: gr.update(visible=has_choice and self._backend.feedback is not None, interactive=True),
            **self._busy(False),
        }

    def _busy(self, is_busy: bool) -> Shown:
        """While an answer is written, what would get in its way is off."""
        parts = self._parts
        off = (parts.talks, parts.new, parts.delete, parts.language, parts.save_feedback)
        found = {part: gr.update(interactive=not is_busy) for part in off}
        if is_busy:
            found |= {part: gr.update(interactive=False) for part in (parts.regenerate, parts.undo, parts.prefer)}
            found |= {part: gr.update(interactive=False) for part in (parts.previous, parts.next)}
        return {**found, parts.send: gr.update(visible=not is_busy), parts.stop: gr.update(visible=is_busy)}

    async def open(self, text: str, language: str) -> Shown:
        """A conversation that the browser has loaded, or a new one."""
        return self.show(given_talk(text), language)

    # Asking

    async def begin(self, text: str, question: str, system: str, language: str) -> Shown:
        """A new question at the end. The browser saves it before it is answered."""
        talk = given_talk(text)
        if not question.strip():
            raise gr.Error(word("needs_question", language), print_exception=False)
        talk.system = system or ""
        talk.add_question(question)
        return {**self._waiting(talk, language), self._parts.question: ""}

    async def fork(self, event: gr.EditData, text: str, system: str, language: str) -> Shown:
        """A question is changed: a new conversation goes on from there, the old one stays as it was."""
        talk = given_talk(text)
        number = message_number(event.index) // 2
        if not 0 <= number < len(talk.rounds):
            raise gr.Error(word("needs_question", language), print_exception=False)
        forked = talk.fork(number, typed(str(event.value)))
        forked.system = system or ""
        return self._waiting(forked, language)

    def _waiting(self, talk: Talk, language: str) -> Shown:
        """The conversation with its last answer still to come."""
        parts = self._parts
        return {
            **self.show(talk, language),
            parts.chat: gr.update(value=messages(talk, language, is_waiting=True)),
            parts.status: word("waiting", language),
            **self._busy(True),
        }

    async def answer(
        self, request: gr.Request, text: str, system: str, language: str, *sampling: Any
    ) -> AsyncIterator[Shown]:
        """Another variant of the last answer; the first one, if there is none yet."""
        parts, talk = self._parts, given_talk(text)
        if not talk.rounds:
            return
        talk.system = system or ""
        round, asked = talk.rounds[-1], talk.messages_of(len(talk.rounds) - 1, talk.system)
        before, round.variants = list(round.variants), []
        waiting = messages(talk, language, is_waiting=True)
        yield {parts.chat: gr.update(value=waiting), parts.status: word("waiting", language), **self._busy(True)}
        variant = Variant(model=self._backend.model_name, system=talk.system)
        try:
            settings = {name: whole(value) for name, value in zip(SAMPLING, sampling, strict=True)}
            session = str(request.session_hash)
            async for variant in answer(self._backend, self._live, owner_of(request), session, asked, settings):
                variant.system = talk.system
                round.variants = [variant]
                yield {
                    parts.chat: gr.update(value=messages(talk, language)),
                    parts.status: status_line(variant, self._backend.context, language),
                }
        except APIError as error:
            variant.error = error.code if error_text(error.code, "", language) else error.message
        finally:
            self._note(variant, request, round.question)
        round.variants = [*before, variant]
        round.chosen = len(before)
        yield self.show(talk, language)

    def _note(self, variant: Variant, request: gr.Request, question: str) -> None:
        """One line an answer, as the API's requests have; texts only where the operator asked for them."""
        owner = getattr(request.request.state, "owner", None) if request.request is not None else None
        key = {"key": owner.key_name} if owner is not None and owner.key_name else {}
        texts = {"prompt": question, "answer": variant.text} if self._backend.settings.log_prompts else {}
        self._log.event(
            "page_answer",
            request_id=variant.request_id,
            model=variant.model,
            prompt_tokens=variant.prompt_tokens,
            completion_tokens=variant.completion_tokens,
            finish=variant.error or variant.finish or "cancelled",
            ms=variant.latency_ms,
            **key,
            **texts,
        )

    async def stop(self, request: gr.Request) -> None:
        """End this page's answers; what they have so far stays."""
        self._live.cancel(str(request.session_hash))

    # Changing

    async def undo(self, text: str, language: str) -> Shown:
        """Take the last round back; its question can be changed and sent again."""
        talk = given_talk(text)
        if not talk.rounds:
            return {}
        question = talk.rounds.pop().question
        return {**self.show(talk, language), self._parts.question: question}

    async def previous(self, text: str, language: str) -> Shown:
        """The variant before the one that is shown."""
        return self._step(text, language, -1)

    async def next(self, text: str, language: str) -> Shown:
        """The variant after the one that is shown."""
        return self._step(text, language, 1)

    def _step(self, text: str, language: str, by: int) -> Shown:
        talk = given_talk(text)
        if talk.rounds:
            last = talk.rounds[-1]
            last.chosen = max(0, min(last.chosen + by, len(last.variants) - 1))
        return self.show(talk, language)


def given_talk(text: str | None) -> Talk:
    """The browser's conversation. What is none is told by Gradio, and nothing of the page changes."""
    try:
        return read_talk(text)
    except APIError as error:
        raise gr.Error(error.message, print_exception=False) from None


def owner_of(request: gr.Request) -> Owner:
    """Who asks, as the border found out. Raises APIError 401 when it did not."""
    owner = getattr(request.request.state, "owner", None) if request.request is not None else None
    if not isinstance(owner, Owner):
        raise no_owner()
    return owner


def message_number(index: Any) -> int:
    """Of a message in the chat; Gradio gives a number, or a pair for a part of a message."""
    return int(index[0] if isinstance(index, list | tuple) else index)


def whole(value: Any) -> Any:
    """Sliders give 3.0 where a field wants 3; the seed is a text, empty for none."""
    if isinstance(value, str):
        text = value.strip()
        return int(text) if re.fullmatch(r"-?\d{1,19}", text, re.ASCII) else text or None
    return int(value) if isinstance(value, float) and value.is_integer() else value
