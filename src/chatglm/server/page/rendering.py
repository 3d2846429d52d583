"""From a conversation to what Gradio's chat shows. A model's text is Markdown, never HTML, and fetches nothing."""

from __future__ import annotations

import re
from typing import Any

from .talk import Round, Talk, Variant
from .words import error_text, word

_CODE = re.compile(
    r"(^(`{3,}|~{3,})[^\n]*\n.*?(?:^\2[`~]*[ \t]*$|\Z)|(`+)(?!`).+?(?<!`)\3(?!`))", re.DOTALL | re.MULTILINE
)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_IMAGE = re.compile(r"!(?=\[)")
_ENTITY = re.compile(r"&(?=#?\w{1,32};)")


def plain_markdown(text: str) -> str:
    """Markdown in which a tag is read as text and an image is a link. Code stays as it is."""
    parts = _CODE.split(text)
    found = []
    for index in range(0, len(parts), 4):  # text, then code with the two fences that its pattern captured
        prose = _ENTITY.sub("&amp;", parts[index])
        found.append(_IMAGE.sub("", _TAG.sub("&lt;", prose)))
        if index + 1 < len(parts):
            found.append(parts[index + 1])
    return "".join(found)


def shown_answer(variant: Variant | None, language: str) -> str:
    """The text of an answer, with what went wrong below it."""
    if variant is None:
        return f"*{word('no_answer', language)}*"
    text = plain_markdown(variant.text)
    if variant.error is not None:
        reason = word("failed", language, reason=plain_markdown(error_text(variant.error, variant.error, language)))
        return f"{text}\n\n⚠ {reason}".lstrip()
    return text


def messages(talk: Talk, language: str, *, is_waiting: bool = False) -> list[dict[str, Any]]:
    """Two for each round, so that message 2n + 1 answers message 2n. The last is missing while it is waited for."""
    found: list[dict[str, Any]] = []
    for round in talk.rounds:
        found.append({"role": "user", "content": plain_markdown(round.question)})
        found.append({"role": "assistant", "content": shown_answer(round.answer, language)})
    if is_waiting and found:
        found.pop()
    return found


def thumbs(talk: Talk) -> list[str | None]:
    """The chosen thumb of each answer, in the order of the answers."""
    names = {1: "Like", -1: "Dislike", None: None}
    return [names.get(_thumb(round)) for round in talk.rounds]


def _thumb(round: Round) -> int | None:
    return round.answer.opinion.thumb if round.answer is not None and round.answer.opinion is not None else None


def status_line(variant: Variant | None, context: int, language: str) -> str:
    """Speed, tokens, what was left out, how it ended."""
    if variant is None or variant.error is not None or not variant.completion_tokens:
        return ""
    parts = [
        word(
            "status",
            language,
            rate=f"{variant.tokens_per_s:.1f}",
            answer=variant.completion_tokens,
            used=variant.prompt_tokens + variant.completion_tokens,
            context=context,
        )
    ]
    if variant.dropped_rounds:
        parts.append(word("dropped", language, dropped=variant.dropped_rounds))
    ends = {"length": "cut", "cancelled": "stopped"}
    if variant.finish in ends:
        parts.append(word(ends[variant.finish], language))
    return " · ".join(parts)
