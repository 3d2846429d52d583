"""One JSON object → one record, whichever of the known formats it is in (spec/training.md §3.1, §4.2).

The format is told by the keys of each object, so that a file may mix them. Read in this order: the records, `parse`,
one reader for each format.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Round = tuple[str, str]


@dataclass(frozen=True)
class Text:
    """Plain text, for blank infilling."""

    text: str
    source: str = ""


@dataclass(frozen=True)
class Dialogue:
    """Rounds of question and answer, oldest first.

    has_history  whether the format has a history, even an empty one: the official preprocessing then numbers rounds
    """

    rounds: tuple[Round, ...]
    system: str | None = None
    source: str = ""
    has_history: bool = False


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, or one answer with a verdict (`score` 1 or -1, then `rejected` is empty)."""

    prompt: str
    history: tuple[Round, ...]
    chosen: str
    rejected: str
    margin: float | None = None
    source: str = ""
    score: int | None = None
    label: str = ""


Record = Text | Dialogue | Preference


@dataclass(frozen=True)
class Columns:
    """Fields that hold prompt, answer and history, for data in a format of its own."""

    prompt: str | None = None
    response: str | None = None
    history: str | None = None


class BadRecordError(Exception):
    """An object that cannot be a record: kind (problems.KINDS) and what was found."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def parse(found: Any, columns: Columns | None = None) -> Record:
    """The record of one JSON value. Raises BadRecordError."""
    if not isinstance(found, dict):
        raise BadRecordError("json", f"a JSON {type(found).__name__}, not an object")
    if columns is not None and columns.prompt is not None:
        return _of_columns(found, columns)
    for keys, reader in _READERS:
        if all(key in found for key in keys):
            return _checked(reader(found))
    raise BadRecordError("keys", _unknown_keys(found))


def _checked(record: Record) -> Record:
    if isinstance(record, Text):
        if not record.text.strip():
            raise BadRecordError("empty", "the text is blank")
        return record
    rounds = record.rounds if isinstance(record, Dialogue) else (*record.history, (record.prompt, record.chosen))
    if not rounds:
        raise BadRecordError("empty", "the dialogue has no round")
    for number, (question, answer) in enumerate(rounds, start=1):
        for name, value in (("question", question), ("answer", answer)):
            if not value.strip():
                where = f" of round {number}" if len(rounds) > 1 else ""
                raise BadRecordError("empty", f"the {name}{where} is blank")
    return record


def _unknown_keys(found: Mapping[str, Any]) -> str:
    known = sorted({key for keys, _ in _READERS for key in keys})
    here = ", ".join(f"`{key}`" for key in list(found)[:6]) or "none"
    hints = []
    for key in found:
        near = difflib.get_close_matches(str(key), known, n=1)
        if near and near[0] not in found:
            hints.append(f"`{key}` may mean `{near[0]}`")
    return f"no known format has the keys {here}" + (f"; {', '.join(hints[:2])}" if hints else "")


def _string(found: Mapping[str, Any], key: str, *, default: str | None = None) -> str:
    value = found.get(key, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise BadRecordError("keys", f"`{key}` is {_shown(value)}, not a string")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _rounds(found: Mapping[str, Any], key: str) -> tuple[Round, ...]:
    value = found.get(key) or []
    if not isinstance(value, list):
        raise BadRecordError("keys", f"`{key}` is {_shown(value)}, not a list of [question, answer]")
    rounds: list[Round] = []
    for number, pair in enumerate(value, start=1):
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not is_pair:
            raise BadRecordError("keys", f"entry {number} of `{key}` is {_shown(pair)}, not [question, answer]")
        rounds.append((pair[0], pair[1]))
    return tuple(rounds)


def _source(found: Mapping[str, Any]) -> str:
    source = found.get("source", "")
    return source if isinstance(source, str) else ""


def _of_columns(found: dict[str, Any], columns: Columns) -> Record:
    assert columns.prompt is not None
    response = columns.response or "response"
    missing = [f"`{key}`" for key in (columns.prompt, response) if key not in found]
    if missing:
        raise BadRecordError("keys", f"there is no {' and no '.join(missing)}; found {', '.join(map(str, found))}")
    history = _rounds(found, columns.history) if columns.history else ()
    last = (_string(found, columns.prompt), _string(found, response))
    return _checked(Dialogue((*history, last), source=_source(found), has_history=columns.history is not None))


def _turns(found: dict[str, Any]) -> Record:
    return Dialogue(_rounds(found, "turns"), _string(found, "system", default="") or None, _source(found))


def _question_answer(found: dict[str, Any]) -> Record:
    return _prompt_like(found, "question", "answer")


def _prompt_response(found: dict[str, Any]) -> Record:
    return _prompt_like(found, "prompt", "response")


def _content_summary(found: dict[str, Any]) -> Record:
    return _prompt_like(found, "content", "summary")


def _prompt_like(found: dict[str, Any], question: str, answer: str) -> Record:
    rounds = (*_rounds(found, "history"), (_string(found, question), _string(found, answer)))
    system = _string(found, "system", default="") or None
    return Dialogue(rounds, system, _source(found), has_history="history" in found)


def _alpaca(found: dict[str, Any]) -> Record:
    instruction, extra = _string(found, "instruction"), _string(found, "input", default="")
    question = f"{instruction}\n{extra}" if extra.strip() else instruction
    rounds = (*_rounds(found, "history"), (question, _string(found, "output")))
    return Dialogue(rounds, _string(found, "system", default="") or None, _source(found), "history" in found)


_SIDES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}


def _conversations(found: dict[str, Any]) -> Record:
    return _messages_of(found, "conversations", "from", "value")


def _messages(found: dict[str, Any]) -> Record:
    return _messages_of(found, "messages", "role", "content")


def _messages_of(found: dict[str, Any], key: str, role: str, content: str) -> Record:
    messages = found[key]
    if not isinstance(messages, list):
        raise BadRecordError("keys", f"`{key}` is {_shown(messages)}, not a list")
    system: str | None = _string(found, "system", default="") or None
    said: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or role not in message or content not in message:
            raise BadRecordError("keys", f"entry {number} of `{key}` is {_shown(message)}, not {{{role}, {content}}}")
        side = _SIDES.get(str(message[role]).lower())
        if side is None:
            raise BadRecordError(
                "roles", f"entry {number} of `{key}` is by `{message[role]}`; known: {', '.join(_SIDES)}"
            )
        text = _spoken(message[content], number, key)
        if side != "system":
            said.append((side, text))
        elif said:
            raise BadRecordError("roles", f"entry {number} of `{key}` is a system message after the dialogue began")
        else:
            system = text if system is None else f"{system}\n{text}"
    return Dialogue(_taking_turns(said, key), system, _source(found))


def _spoken(value: Any, number: int, key: str) -> str:
    """A message's text; OpenAI's list of parts is joined where all parts are text."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRecordError("keys", f"entry {number} of `{key}` says {_shown(value)}, not text")
    return value


def _taking_turns(said: list[tuple[str, str]], key: str) -> tuple[Round, ...]:
    for number, (side, _) in enumerate(said, start=1):
        if side != ("user", "assistant")[(number - 1) % 2]:
            wanted = "a question" if side == "assistant" else "an answer"
            raise BadRecordError("roles", f"message {number} of `{key}` is by the {side}, where {wanted} belongs")
    if len(said) % 2:
        raise BadRecordError("roles", f"`{key}` ends with a question that has no answer")
    return tuple((said[i][1], said[i + 1][1]) for i in range(0, len(said), 2))


def _text(found: dict[str, Any]) -> Record:
    return Text(_string(found, "text"), _source(found))


def _pair(found: dict[str, Any]) -> Record:
    margin = found.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise BadRecordError("keys", f"`margin` is {_shown(margin)}, not a number")
    return Preference(
        _string(found, "prompt"),
        _rounds(found, "history"),
        _string(found, "chosen"),
        _string(found, "rejected"),
        margin,
        _source(found),
    )


def _correction(found: dict[str, Any]) -> Record:
    """A user's better answer beside the model's own: a preference, and good for fine-tuning as it is."""
    chosen, rejected = _string(found, "response"), _string(found, "original")
    return Preference(
        _string(found, "prompt"), _rounds(found, "history"), chosen, rejected, source=_source(found), label="correction"
    )


def _thumb(found: dict[str, Any]) -> Record:
    score = found["score"]
    if score not in (1, -1) or isinstance(score, bool):
        raise BadRecordError("keys", f"`score` is {_shown(score)}; it must be 1 or -1")
    return Preference(
        _string(found, "prompt"), _rounds(found, "history"), _string(found, "answer"), "", None, _source(found), score
    )


_READERS: list[tuple[tuple[str, ...], Callable[[dict[str, Any]], Record]]] = [
    (("prompt", "chosen", "rejected"), _pair),
    (("prompt", "response", "original"), _correction),
    (("prompt", "answer", "score"), _thumb),
    (("turns",), _turns),
    (("messages",), _messages),
    (("conversations",), _conversations),
    (("instruction", "output"), _alpaca),
    (("prompt", "response"), _prompt_response),
    (("question", "answer"), _question_answer),
    (("content", "summary"), _content_summary),
    (("text",), _text),
]
"""Keys that tell a format, the more telling ones first."""
