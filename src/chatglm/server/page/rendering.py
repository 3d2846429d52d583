"""From a conversation to what Gradio's chat shows. A model's text is Markdown, never HTML, and fetches nothing."""

from __future__ import annotations

import re
from typing import Any

from .talk import Round, Talk, Variant
from .words import error_text, word

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_BLANK_LINE = re.compile(r"((?:\r\n|\r|\n)[ \t]*(?=\r\n|\r|\n))")
_TICKS = re.compile(r"`+")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_IMAGE = re.compile(r"!+(?=\[)")
_SHOWN = re.compile(r"&lt;(?=[A-Za-z/!?])|&amp;(?=#?\w{1,32};)")
_ENTITY = re.compile(r"&(?=#?\w{1,32};)")


def plain_markdown(text: str) -> str:
    """Markdown in which a tag is read as text and an image is a link. Code stays as it is.

    For looks: what keeps HTML out is Gradio's sanitizer and the page's policy. Takes time in proportion to the text,
    whatever is in it, as it runs in the server's loop.
    """
    found: list[str] = []
    prose: list[str] = []
    fence = ""
    for line in _LINE.findall(text):
        opening = _FENCE.match(line)
        if fence:
            found.append(line)
            if opening and opening[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif opening:
            found += [_plain(prose), line]
            prose, fence = [], opening[1]
        else:
            prose.append(line)
    return "".join([*found, _plain(prose)])


def _plain(lines: list[str]) -> str:
    """Text without fences, paragraph by paragraph."""
    return "".join(map(_paragraph, _BLANK_LINE.split("".join(lines))))


def _paragraph(text: str) -> str:
    """Between two runs of so many backticks is code, unless a backslash stands before the first."""
    ticks = list(_TICKS.finditer(text))
    later: dict[str, list[int]] = {}  # by run, the places that are still ahead, the nearest last
    for place in range(len(ticks) - 1, -1, -1):
        later.setdefault(ticks[place][0], []).append(place)
    found, at, place = [], 0, 0
    while place < len(ticks):
        same = later[ticks[place][0]]
        while same and same[-1] <= place:
            same.pop()
        start = ticks[place].start()
        if not same or (start and text[start - 1] == "\\"):
            place += 1
            continue
        end = ticks[same[-1]].end()
        found += [_escaped(text[at:start]), text[start:end]]
        at, place = end, same[-1] + 1
    return "".join([*found, _escaped(text[at:])])


def _escaped(text: str) -> str:
    return _IMAGE.sub("", _TAG.sub("&lt;", _ENTITY.sub("&amp;", text)))


def typed(shown: str) -> str:
    """What a reader meant who has edited a shown text."""
    return _SHOWN.sub(lambda found: "<" if found[0] == "&lt;" else "&", shown)


def shown_answer(variant: Variant | None, language: str) -> str:
    """The text of an answer, with what went wrong below it."""
    if variant is None:
        return f"*{word('no_answer', language)}*"
    text = plain_markdown(variant.text)
    if not text.strip() and variant.finish and variant.error is None:
        return f"*{word('empty_answer', language)}*"
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


def status_line(variant: Variant | None, context: int, language: str, *, names_model: bool = False) -> str:
    """Speed, tokens, what was left out, how it ended; first the model, where there are several."""
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
    if names_model and variant.model:
        parts.insert(0, plain_markdown(variant.model))
    if variant.dropped_rounds:
        parts.append(word("dropped", language, dropped=variant.dropped_rounds))
    ends = {"length": "cut", "cancelled": "stopped"}
    if variant.finish in ends:
        parts.append(word(ends[variant.finish], language))
    return " · ".join(parts)
