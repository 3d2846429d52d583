"""Prompts with the answers that are wanted, from JSON lines or JSON files with whatever names their fields have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError

PROMPT_NAMES = ("prompt", "content", "question", "instruction")
ANSWER_NAMES = ("response", "summary", "answer", "output", "chosen")
"""Looked for in this order: the official dialogue and ADGEN files, plain questions, alpaca, preferences."""


@dataclass(frozen=True)
class Pair:
    """A question, the rounds before it, and the answer that is wanted (None where the file has none)."""

    prompt: str
    answer: str | None
    history: tuple[tuple[str, str], ...] = ()


def read_pairs(
    path: Path,
    *,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    needs_answers: bool = True,
    most: int | None = None,
) -> list[Pair]:
    """The pairs of a file, one JSON object a line, or one JSON array of them.

    An alpaca record's `input` follows its instruction on a new line. Raises RequestError naming file and line.
    """
    pairs = []
    for where, record in _records(path):
        prompt = _text(record, prompt_column, PROMPT_NAMES, where)
        if isinstance(record.get("input"), str) and record["input"]:
            prompt = f"{prompt}\n{record['input']}"
        has_answer = answer_column is not None or any(name in record for name in ANSWER_NAMES)
        answer = _text(record, answer_column, ANSWER_NAMES, where) if needs_answers or has_answer else None
        pairs.append(Pair(prompt, answer, _history(record.get("history") or [], where)))
        if most is not None and len(pairs) == most:
            break
    if not pairs:
        raise RequestError(f"{path} holds no prompt", cure="give one JSON object a line")
    return pairs


def _records(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as UTF-8 text ({error})") from error
    if text.lstrip().startswith("["):
        found = [(f"{path}, entry {number}", entry) for number, entry in enumerate(_json(text, str(path)), start=1)]
    else:
        lines = enumerate(text.splitlines(), start=1)
        found = [
            (where := f"{path}, line {number}", _json(line, where)) for number, line in lines if line.strip()
        ]  # fmt: skip
    for where, entry in found:
        if not isinstance(entry, dict):
            raise RequestError(f"{where}: {type(entry).__name__}, not an object")
    return found


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where}: not JSON ({error.msg}, column {error.colno})") from error


def _text(record: Mapping[str, Any], column: str | None, names: tuple[str, ...], where: str) -> str:
    name = column or next((name for name in names if name in record), None)
    if name is None or not isinstance(record.get(name), str):
        wanted = f"`{column}`" if column else "one of " + ", ".join(f"`{known}`" for known in names)
        raise RequestError(f"{where}: the keys are {', '.join(record)}; expected a text in {wanted}")
    return str(record[name])


def _history(rounds: Any, where: str) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((str(question), str(answer)) for question, answer in rounds)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where}: history must be a list of [question, answer]") from error
