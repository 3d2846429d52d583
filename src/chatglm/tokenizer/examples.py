"""Dialogues and plain text as examples: what stands before `<sop>`, and the tokens that should follow it.

The same two forms serve calibration and evaluation. A dialogue gives one example a round: its context is the chat
template's, its answer ends in `<eop>`. A text is cut into spans: each span is the answer, with no end token, and the
text before it is the context.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from . import template
from .tokenizer import Tokenizer

SPAN_TOKENS = 256
"""Tokens of a text that are scored together, and at most as many before them that are seen."""

Document = list[tuple[str, str]] | str
"""The rounds of a dialogue, or a text."""


@dataclass(frozen=True)
class Example:
    """Ids of a context, `[gMASK]` at its end and `<sop>` left out, and of what follows `<sop>`.

    num_bytes  UTF-8 bytes of the text that `answer_ids` spell
    """

    context_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    num_bytes: int

    def __len__(self) -> int:
        """Tokens of the whole row, `<sop>` counted."""
        return len(self.context_ids) + 1 + len(self.answer_ids)


def dialogue_examples(tokenizer: Tokenizer, rounds: Sequence[tuple[str, str]], limit: int) -> Iterator[Example]:
    """One example for each round of a dialogue, with the rounds before it in the context.

    limit  tokens of a row: the oldest rounds are left out where a context would leave no room for its answer, and a
           round that alone is too long gives no example
    """
    for number, (question, answer) in enumerate(rounds):
        answer_ids = (*tokenizer.encode(answer), tokenizer.eop_id)
        for dropped in range(number + 1):
            prompt = template.render(question, rounds[dropped:number])
            context = tuple(tokenizer.encode_context(prompt)[:-1])
            if len(context) + 1 + len(answer_ids) <= limit:
                yield Example(context, answer_ids, len(answer.encode()))
                break


def text_examples(tokenizer: Tokenizer, text: str, limit: int, span: int = SPAN_TOKENS) -> Iterator[Example]:
    """A text in spans of `span` tokens; every token is in the answer of exactly one example.

    The context is the `span` tokens before (fewer at the beginning: there it is `[gMASK]` alone), so a row has at most
    2 · span + 2 tokens; `span` is made smaller where `limit` asks for that.
    """
    span = max(1, min(span, (limit - 2) // 2))
    ids = tokenizer.encode(text)
    boundaries = [len(tokenizer.decode(ids[:end]).encode()) for end in range(0, len(ids), span)]
    ends = [*boundaries[1:], len(text.encode())]
    for number, start in enumerate(range(0, len(ids), span)):
        before = ids[max(0, start - span) : start]
        answer = tuple(ids[start : start + span])
        yield Example((*before, tokenizer.gmask_id), answer, ends[number] - boundaries[number])


def read_examples(
    path: Path, tokenizer: Tokenizer, limit: int, *, most: int | None = None, span: int = SPAN_TOKENS
) -> list[Example]:
    """The examples of a file (see read_documents): every round of a dialogue, every span of a text.

    most  so many dialogues and texts, or so many spans where the file is one text, from the beginning; None: all
    Raises RequestError naming file and line.
    """
    documents = read_documents(path)
    if path.suffix != ".jsonl":
        return [*text_examples(tokenizer, str(documents[0]), limit, span)][:most]
    examples: list[Example] = []
    for document in documents[:most]:
        if isinstance(document, str):
            examples += text_examples(tokenizer, document, limit, span)
        else:
            examples += dialogue_examples(tokenizer, document, limit)
    return examples


def read_documents(path: Path) -> list[Document]:
    """Dialogues and texts of a file.

    `.jsonl`  a line each: `{"turns": [[question, answer], …]}`, `{"question": …, "answer": …}` or `{"text": …}`
    others    one plain text
    Raises RequestError naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as UTF-8 text ({error})") from error
    if path.suffix != ".jsonl":
        return [text]
    lines = enumerate(text.splitlines(), start=1)
    return [_parsed(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _parsed(line: str, where: str) -> Document:
    try:
        found: Any = json.loads(line)
        if "text" in found:
            return _string(found["text"])
        turns: Iterable[Any] = found["turns"] if "turns" in found else [(found["question"], found["answer"])]
        return [(_string(question), _string(answer)) for question, answer in turns]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{where}: no dialogue ({type(error).__name__}: {error})",
            cure='write `{"turns": [["question", "answer"], …]}` or `{"text": "…"}`, one object a line',
        ) from error


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value
