"""Chinese or English first? Every line of the chat is understandable to readers of either."""

from __future__ import annotations

import locale
import os
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
