"""What happens when something is pressed: each event takes the conversation from the browser and gives it back."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Any

import gradio as gr

from ..api_errors import APIError
from ..backend import Backend, Owner
from ..logs import RequestLog
from .answering import LiveAnswers, answer, no_owner
from .controls import rated_answer, rating_controls
from .layout import SAMPLING, Parts
from .rendering import messages, status_line, thumbs, typed
from .talk import Talk, Variant, read_talk
from .words import error_text, word

Shown = dict[Any, Any]
"""New values by component; those that are missing stay.

What a reader may be typing or choosing meanwhile is never among them: the browser writes the system text, the name and
the question's box itself, in the moment of the action; the rating controls are written only when their answer changes.
"""


class Events:
    """The page's behaviour over a backend."""

    def __init__(self, backend: Backend, parts: Parts, live: LiveAnswers, log: RequestLog) -> None:
        self._backend, self._parts, self._live, self._log = backend, parts, live, log

    # Showing

    def show(self, talk: Talk, language: str) -> Shown:
        """Everything that follows from the conversation; the rating controls as they stand for its last answer."""
        return {
            self._parts.talk: talk.model_dump_json(),
            **self._shown(talk, language),
            self._parts.rated: None,
            **rating_controls(self._parts, talk, None, language),
        }

    def show_answer(self, talk: Talk, language: str) -> Shown:
        """The conversation with something new about its answers; what is in the rating controls stays."""
        return {self._parts.talk: talk.model_dump_json(), **self._shown(talk, language)}

    def _shown(self, talk: Talk, language: str) -> Shown:
        parts = self._parts
        last = talk.rounds[-1] if talk.rounds else None
        count = len(last.variants) if last is not None else 0
        has_choice = count > 1
        number = min(last.chosen, count - 1) + 1 if last is not None and count else 0
        return {
            parts.chat: gr.update(value=messages(talk, language), feedback_value=thumbs(talk)),
            parts.status: self._status(last.answer if last else None, language),
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

    def _status(self, variant: Variant | None, language: str) -> str:
        return status_line(variant, self._backend.context, language, names_model=len(self._backend.model_ids) > 1)

    async def open(self, text: str, language: str) -> Shown:
        """What the browser has put into `talk`, which is not written again: a question may be on its way."""
        shown = self.show(given_talk(text), language)
        del shown[self._parts.talk]
        return shown

    def working(self, request: gr.Request) -> AbstractContextManager[None]:
        """An event that takes its time and changes the conversation: others wait until it is over."""
        return self._live.working(str(request.session_hash))

    def check_free(self, request: gr.Request, language: str) -> None:
        """Raises gr.Error while another event changes this page's conversation: one of them would be lost."""
        if self.is_busy(request):
            raise gr.Error(word("busy", language), print_exception=False)

    def is_busy(self, request: gr.Request) -> bool:
        """Whether this page has an answer or a rating under way."""
        return str(request.session_hash) in self._live.busy

    # Asking

    async def begin(self, request: gr.Request, text: str, question: str, system: str, language: str) -> Shown:
        """A new question at the end. The browser saves it before it is answered, and takes it out of its box."""
        self.check_free(request, language)
        talk = given_talk(text)
        if not given_text(question).strip():
            raise gr.Error(word("needs_question", language), print_exception=False)
        talk.system = given_text(system)
        talk.add_question(question)
        return self._waiting(talk, language)

    async def fork(self, event: gr.EditData, request: gr.Request, text: str, system: str, language: str) -> Shown:
        """A question is changed: a new conversation goes on from there, the old one stays as it was."""
        self.check_free(request, language)
        talk = given_talk(text)
        number = message_number(event.index) // 2
        if not 0 <= number < len(talk.rounds):
            raise gr.Error(word("needs_question", language), print_exception=False)
        forked = talk.fork(number, typed(str(event.value)))
        forked.system = given_text(system)
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
        self, request: gr.Request, text: str, system: str, language: str, model: str, *sampling: Any
    ) -> AsyncIterator[Shown]:
        """Another variant of the last answer; the first one, if there is none yet."""
        self.check_free(request, language)
        talk = given_talk(text)
        if not talk.rounds:
            return
        with self.working(request):
            async for shown in self._answer(request, talk, system, language, model, *sampling):
                yield shown

    async def _answer(
        self, request: gr.Request, talk: Talk, system: str, language: str, model: str, *sampling: Any
    ) -> AsyncIterator[Shown]:
        parts = self._parts
        talk.system = given_text(system)
        round, asked = talk.rounds[-1], talk.messages_of(len(talk.rounds) - 1, talk.system)
        before, round.variants = list(round.variants), []
        waiting = messages(talk, language, is_waiting=True)
        yield {
            parts.chat: gr.update(value=waiting),
            parts.status: word("waiting", language),
            parts.rated: None,
            **rating_controls(parts, talk, None, language),  # now, not at the end: an opinion may be written meanwhile
            **self._busy(True),
        }
        model = given_text(model) or self._backend.model_name
        variant = Variant(model=model, system=talk.system)
        try:
            settings = {name: whole(value) for name, value in zip(SAMPLING, sampling, strict=True)}
            session = str(request.session_hash)
            async for variant in answer(self._backend, self._live, owner_of(request), session, model, asked, settings):
                variant.system = talk.system
                round.variants = [variant]
                yield {
                    parts.chat: gr.update(value=messages(talk, language)),
                    parts.status: self._status(variant, language),
                }
        except APIError as error:
            variant.error = error.code if error_text(error.code, "", language) else error.message
        finally:
            self._note(variant, request, round.question)
        round.variants = [*before, variant]
        round.chosen = len(before)
        yield {**self.show_answer(talk, language), **rated_answer(parts, talk, None, language)}

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

    async def undo(self, request: gr.Request, text: str, language: str) -> Shown:
        """Take the last round back; the browser puts its question into the box, before what is there already."""
        self.check_free(request, language)
        talk = given_talk(text)
        if not talk.rounds:
            return {}
        question = talk.rounds.pop().question
        return {**self.show(talk, language), self._parts.taken: question}

    async def previous(self, request: gr.Request, text: str, language: str) -> Shown:
        """The variant before the one that is shown."""
        self.check_free(request, language)
        return self._step(text, language, -1)

    async def next(self, request: gr.Request, text: str, language: str) -> Shown:
        """The variant after the one that is shown."""
        self.check_free(request, language)
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
        return read_talk(given_text(text))
    except APIError as error:
        raise gr.Error(error.message, print_exception=False) from None


def given_text(value: Any) -> str:
    """A text of the browser's; empty for what is none."""
    return value if isinstance(value, str) else ""


def owner_of(request: gr.Request) -> Owner:
    """Who asks, as the border found out. Raises APIError 401 when it did not."""
    owner = getattr(request.request.state, "owner", None) if request.request is not None else None
    if not isinstance(owner, Owner):
        raise no_owner()
    return owner


def message_number(index: Any) -> int:
    """Of a message in the chat; Gradio gives a number, or a pair for a part of a message."""
    number = index[0] if isinstance(index, list | tuple) and index else index
    return number if isinstance(number, int) else -1


def whole(value: Any) -> Any:
    """Sliders give 3.0 where a field wants 3; the seed is a text, empty for none."""
    if isinstance(value, str):
        text = value.strip()
        return int(text) if re.fullmatch(r"-?\d{1,19}", text, re.ASCII) else text or None
    return int(value) if isinstance(value, float) and value.is_integer() else value
