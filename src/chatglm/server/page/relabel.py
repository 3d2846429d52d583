"""The page in another language, without loading it again."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .events import Shown
from .layout import Parts, tag_choices, thumb_choices
from .words import word

LABELS = (
    ("model", "model"),
    ("talks", "conversations"),
    ("manage", "manage"),
    ("name", "name"),
    ("settings", "settings"),
    ("system", "system"),
    ("temperature", "temperature"),
    ("top_p", "top_p"),
    ("top_k", "top_k"),
    ("max_tokens", "max_tokens"),
    ("repetition_penalty", "repetition_penalty"),
    ("seed", "seed"),
    ("language", "language"),
    ("chat", "chat"),
    ("question", "question"),
    ("feedback", "feedback"),
    ("thumb", "thumb"),
    ("rating", "rating"),
    ("correction", "correction"),
    ("comment", "comment"),
    ("consent", "consent"),
)
VALUES = (
    "new",
    "rename",
    "delete",
    "export_markdown",
    "export_json",
    "dark",
    "reset",
    "send",
    "stop",
    "regenerate",
    "undo",
    "prefer",
    "save_feedback",
    "delete_feedback",
    "warning",
)
HINTS = (("system", "system_hint"), ("question", "question_hint"), ("correction", "correction_hint"), ("chat", "empty"))


def labelled(parts: Parts) -> list[Any]:
    """The components whose texts change."""
    names = [*(name for name, _ in LABELS), *VALUES, "tags"]
    return [getattr(parts, name) for name in names]


def relabel(parts: Parts, language: str) -> Shown:
    """Every text of the page."""
    changes: dict[str, dict[str, Any]] = {}
    for name, key in LABELS:
        changes.setdefault(name, {})["label"] = word(key, language)
    for name in VALUES:
        changes.setdefault(name, {})["value"] = word(name, language)
    for name, key in HINTS:
        changes.setdefault(name, {})["placeholder"] = word(key, language)
    changes["thumb"]["choices"] = thumb_choices(language)
    changes["tags"] = {"label": word("tags", language), "choices": tag_choices(language)}
    return {getattr(parts, name): gr.update(**change) for name, change in changes.items()}
