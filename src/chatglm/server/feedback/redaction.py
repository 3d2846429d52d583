"""Names of people out of exported data, as far as patterns go: a help for a reader, not a guarantee."""

from __future__ import annotations

import re
from typing import Any

PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("EMAIL", re.compile(r"(?<![\w.%+-])[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")),
    ("URL", re.compile(r"https?://[^\s<>\"'）】，。]+")),
    ("ID", re.compile(r"(?<![0-9A-Za-z])\d{17}[0-9Xx](?![0-9A-Za-z])")),
    ("CARD", re.compile(r"(?<![0-9A-Za-z])(?:\d{4}[ -]?){3}\d{1,7}(?![0-9A-Za-z])")),
    ("PHONE", re.compile(r"(?<![0-9A-Za-z])(?:\+\d{1,3}[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?!\d)")),
    ("PHONE", re.compile(r"(?<![0-9A-Za-z])(?:\+\d{1,3}[ -]?)?\(?\d{3,4}\)?[ -]\d{3,4}[ -]?\d{4}(?!\d)")),
    ("IP", re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")),
)
KEPT = frozenset(
    ("id", "answer_id", "answer_ids", "conversation_id", "preferred_over", "prompt_ids_sha256", "request_id")
) | {"fingerprint", "model"}
WHOLE = ("key_name",)
"""Fields that name a person by themselves."""


def redacted(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Addresses and numbers become `[EMAIL]`, `[PHONE]`, …; raters become numbers, the same within one export."""
    numbers: dict[str, str] = {}
    return [{name: _field(name, value, numbers) for name, value in line.items()} for line in lines]


def _field(name: str, value: Any, numbers: dict[str, str]) -> Any:
    if name in WHOLE:
        return None
    if name == "rater":
        return numbers.setdefault(value, f"rater-{len(numbers) + 1}")
    if name == "raters":
        return [numbers.setdefault(rater, f"rater-{len(numbers) + 1}") for rater in value]
    return value if name in KEPT else _texts(value)


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        for label, pattern in PATTERNS:
            value = pattern.sub(f"[{label}]", value)
        return value
    if isinstance(value, list):
        return [_texts(item) for item in value]
    if isinstance(value, dict):
        return {key: _texts(item) for key, item in value.items()}
    return value
