"""Chinese or English? Every line of the chat is understandable to readers of either; the reader's own comes first."""

from __future__ import annotations

import locale
import os
import re
from collections.abc import Mapping


def prefers_chinese(environ: Mapping[str, str] = os.environ) -> bool:
    """By LC_ALL, LC_MESSAGES or LANG (the first that is set); by the system where none is."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if value := environ.get(name):
            return value.lower().startswith("zh")
    return (locale.getlocale()[0] or "").lower().startswith(("zh", "chinese"))


def both(chinese: str, english: str, *, between: str = "  |  ") -> str:
    """The two texts, the reader's language first."""
    return between.join((chinese, english) if prefers_chinese() else (english, chinese))


_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_WORD = re.compile(r"[A-Za-z]+")


def language_of(text: str) -> str | None:
    """`zh` or `en`, by what there is more of: Chinese characters or Latin words. None for neither (`1 + 1 =`)."""
    chinese, words = len(_CHINESE.findall(text)), len(_WORD.findall(text))
    return None if chinese == words == 0 else "zh" if chinese >= words else "en"


def rounds_in_language_of(question: str, rounds: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The rounds whose question is in the language of `question`, or in none."""
    wanted = language_of(question)
    return [pair for pair in rounds if wanted is None or language_of(pair[0]) in (None, wanted)]
