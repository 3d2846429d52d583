"""Conversation: rounds, system message and settings of one chat, and the JSON file that keeps them."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.sampling import SamplingParams
from ..errors import ChatGLMError, RequestError

FORMAT = "chatglm-conversation"


class ConversationFileError(ChatGLMError):
    """A saved conversation that cannot be read or written; the message is one line."""


@dataclass
class Conversation:
    """What a chat remembers.

    rounds    (question, answer), oldest first
    system    text put before the first question, or None
    settings  fields of SamplingParams that differ from the card's; always valid
    """

    rounds: list[tuple[str, str]] = field(default_factory=list)
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path, model: str) -> None:
        """Write beside the file, then rename. Raises ConversationFileError."""
        content = {
            "format": FORMAT,
            "version": 1,
            "model": model,
            "system": self.system,
            "settings": self.settings,
            "rounds": [{"question": question, "answer": answer} for question, answer in self.rounds],
        }
        try:
            write_beside(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
        except OSError as error:
            raise ConversationFileError(f"{path}: cannot be written ({error.strerror or error})") from error

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote, or a plain list of [question, answer] pairs as the original's `history` is.

        Raises ConversationFileError: one line that names the file and what is wrong.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConversationFileError(f"{path}: cannot be read ({error.strerror or error})") from error
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise ConversationFileError(f"{path}: not JSON ({place}: {error.msg})") from error
        except (UnicodeDecodeError, RecursionError) as error:
            raise ConversationFileError(f"{path}: not a conversation ({type(error).__name__})") from error
        if isinstance(content, list):
            content = {"format": FORMAT, "rounds": content}
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ConversationFileError(f'{path}: not a conversation saved by chatglm (no "format": "{FORMAT}")')
        system = content.get("system")
        if system is not None and not isinstance(system, str):
            raise ConversationFileError(f"{path}: `system` is not a text")
        return cls(_rounds(content.get("rounds"), path), system, _settings(content.get("settings") or {}, path))


def _rounds(raw: Any, path: Path) -> list[tuple[str, str]]:
    if not isinstance(raw, list):
        raise ConversationFileError(f"{path}: `rounds` is not a list")
    rounds = []
    for number, entry in enumerate(raw):
        pair = [entry.get("question"), entry.get("answer")] if isinstance(entry, dict) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ConversationFileError(f"{path}: round {number} is not a question and an answer")
        rounds.append((pair[0], pair[1]))
    return rounds


def _settings(raw: Any, path: Path) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ConversationFileError(f"{path}: `settings` is not an object")
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    try:
        SamplingParams.from_mapping(settings)
    except (RequestError, TypeError) as error:
        raise ConversationFileError(f"{path}: {error}") from error
    return settings


def write_beside(path: Path, text: str) -> None:
    """Put `text` into a new file beside `path`, then rename: either the old file or the new one is there. OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
