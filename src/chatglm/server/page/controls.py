"""The rating controls as they stand for an answer. Only events about that answer write them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .layout import Parts
from .talk import Opinion, Talk
from .words import word


def rating_controls(parts: Parts, talk: Talk, rated: Any, language: str) -> dict[Any, Any]:
    """Every control with what is stored about the rated answer; empty where nothing is."""
    number = rated_round(talk, rated)
    answer = talk.rounds[number].answer if number is not None else None
    opinion = (answer.opinion if answer else None) or Opinion()
    return {
        **rated_answer(parts, talk, rated, language),
        parts.thumb: opinion.thumb,
        parts.rating: opinion.rating,
        parts.correction: opinion.correction or "",
        parts.tags: opinion.tags,
        parts.comment: opinion.comment or "",
    }


def rated_answer(parts: Parts, talk: Talk, rated: Any, language: str) -> dict[Any, Any]:
    """Which answer the controls are about, without what a reader has put into them."""
    number = rated_round(talk, rated)
    answer = talk.rounds[number].answer if number is not None else None
    where = word("rated", language, number=number + 1, count=len(talk.rounds)) if number is not None else ""
    return {
        parts.feedback_place: where,
        parts.delete_feedback: gr.update(interactive=answer is not None and answer.opinion is not None),
    }


def rated_round(talk: Talk, rated: Any) -> int | None:
    """The round that is being rated; the last where none was picked, None where there is no answer."""
    if not talk.rounds:
        return None
    number = int(rated) if isinstance(rated, int | float) and 0 <= rated < len(talk.rounds) else len(talk.rounds) - 1
    return number if talk.rounds[number].answer is not None else None
