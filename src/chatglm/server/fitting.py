"""From a conversation or a text to the ids of a context that leaves room for the answer."""

from __future__ import annotations

import asyncio

from ..errors import PromptTooLongError
from ..tokenizer import template
from ..tokenizer.vocabulary import LONGEST_BLANK
from .api_errors import APIError
from .backend import Backend
from .conversation import Conversation


def context_exceeded(context: int, prompt: int, asked: int, *, at_least: bool = False) -> APIError:
    """The refusal with its four numbers."""
    fits = max(0, context - prompt)
    return APIError(
        400,
        "context_length_exceeded",
        f"the context holds {context:,} tokens; the prompt has {'at least ' if at_least else ''}{prompt:,}, "
        f"{asked:,} are asked for the answer; at most {fits:,} would fit. Shorten the prompt or lower max_tokens",
        param="messages",
    )


async def fit_conversation(
    backend: Backend, conversation: Conversation, answer_tokens: int, *, may_drop: bool
) -> template.Fitted:
    """Fitted in a thread. Raises APIError when the question (or, without dropping, all of it) does not fit."""
    last = len(conversation.question) + len(conversation.system or "")
    least = last // LONGEST_BLANK  # no piece is longer
    if least + answer_tokens > backend.context:
        raise context_exceeded(backend.context, least, answer_tokens, at_least=True)
    rounds = conversation.rounds
    room, kept = backend.context * LONGEST_BLANK, 0
    for asked, answered in reversed(rounds):  # what cannot fit is not tokenised either
        room -= len(asked) + len(answered)
        if room < 0:
            break
        kept += 1
    skipped = len(rounds) - kept
    try:
        fitted = await asyncio.to_thread(
            template.fit,
            backend.tokenizer,
            conversation.question,
            rounds[skipped:],
            system=conversation.system,
            limit=backend.context,
            max_new_tokens=answer_tokens,
        )
    except PromptTooLongError:
        text = template.render(conversation.question, (), conversation.system)
        length = len(await asyncio.to_thread(backend.tokenizer.encode_context, text))
        raise context_exceeded(backend.context, length, answer_tokens) from None
    dropped = fitted.dropped_rounds + skipped
    if dropped and not may_drop:
        text = template.render(conversation.question, rounds, conversation.system)
        length = len(await asyncio.to_thread(backend.tokenizer.encode_context, text))
        raise context_exceeded(backend.context, length, answer_tokens)
    return template.Fitted(fitted.prompt, fitted.ids, dropped, fitted.max_new_tokens)


def check_room(backend: Backend, ids: list[int], answer_tokens: int) -> None:
    """Raises APIError when ids and answer exceed the context."""
    if len(ids) + answer_tokens > backend.context:
        raise context_exceeded(backend.context, len(ids), answer_tokens)
