"""Post-processing of answers, as the original's `chat` does it (spec/chatglm-6b.md §5.8).

The tokenizer folds full-width punctuation to ASCII, so the model writes ASCII; beside a Chinese character it is
put back.
"""

from __future__ import annotations

import re

TRAINING_TIME_MARK = "[[训练时间]]"
"""A placeholder of the training data; it is shown as the year."""

_FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")
_BESIDE_CHINESE = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


def normalize_answer(text: str) -> str:
    """The text of a decoded answer as it is shown and kept in the history.

    Edge blanks are removed, the training-time mark becomes 2023年, and `, ! : ; ?` directly before or after a character
    U+4E00 to U+9FFF become full-width.
    """
    return normalize_piece(text.strip(), "")


def normalize_piece(text: str, before: str) -> str:
    """A part of an answer, with nothing removed at its edges. before: the character in front of it, as it was shown."""
    whole = before + text.replace(TRAINING_TIME_MARK, "2023年")
    return _BESIDE_CHINESE.sub(lambda match: match[0].translate(_FULL_WIDTH), whole)[len(before) :]
