"""Byte streams → blocks of whole records: what one worker reads at once. The same input gives the same blocks."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from chatglm.errors import TrainingError

from .inputs import Input

BLOCK_BYTES = 4 << 20
Separation = Literal["file", "blank", "line"]
"""What ends a document of a plain text: the file, a blank line, every line."""


@dataclass(frozen=True)
class Block:
    """Whole records, or a part of a document that is larger than a block.

    data        lines as they are in the file
    lines       line number of each line of `data`, where they are not consecutive (objects of a JSON array)
    is_continued  plain text: the last document goes on in the next block
    consumed    bytes of the files on disk that were read up to here
    """

    number: int
    file: str
    form: Literal["jsonl", "text"]
    first_line: int
    data: bytes
    lines: tuple[int, ...] | None = None
    is_continued: bool = False
    consumed: int = 0


def blocks_of(
    inputs: Iterator[Input], separation: Separation = "file", block_bytes: int = BLOCK_BYTES
) -> Iterator[Block]:
    """Blocks of all streams, numbered. Raises TrainingError for an encoding that has no lines of bytes (UTF-16)."""
    number = 0
    for found in inputs:
        for block in _of_one(found, separation, block_bytes):
            yield Block(
                number,
                found.name,
                block.form,
                block.first_line,
                block.data,
                block.lines,
                block.is_continued,
                found.consumed(),
            )
            number += 1


def _of_one(found: Input, separation: Separation, block_bytes: int) -> Iterator[Block]:
    head = found.read(block_bytes)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise TrainingError(
            f"{found.name} is UTF-16, which has no lines of bytes", cure=f"iconv -f UTF-16 -t UTF-8 {found.name}"
        )
    head = head.removeprefix(codecs.BOM_UTF8)
    start = head.lstrip()[:1]
    form = found.form or ("jsonl" if start == b"{" else "json" if start == b"[" else "text")
    if form == "json" and start != b"[":
        form = "json" if b"}\n{" not in head.replace(b"\r", b"") and _is_spread(head) else "jsonl"
    if form == "json":
        yield from _of_values(found, head, block_bytes)
    else:
        yield from _of_lines(found, head, "text" if form == "text" else "jsonl", separation, block_bytes)


def _is_spread(head: bytes) -> bool:
    """Whether the first object of a .json file goes over several lines."""
    first = head.lstrip().split(b"\n", 1)[0]
    try:
        json.loads(first)
    except ValueError:
        return True
    return False


def _of_lines(
    found: Input, head: bytes, form: Literal["jsonl", "text"], separation: Separation, block_bytes: int
) -> Iterator[Block]:
    data, line = head, 1
    while data:
        more = found.read(block_bytes)
        while more:
            end, continues = _cut(data, form, separation)
            if end:
                break
            data, more = data + more, found.read(block_bytes)
        else:
            end, continues = len(data), False
        part = data[:end]
        yield Block(0, "", form, line, part, None, continues)
        line += part.count(b"\n")
        data = data[end:] + more


def _cut(data: bytes, form: str, separation: Separation) -> tuple[int, bool]:
    """Where a block may end, 0 for nowhere, and whether its last document goes on."""
    line_end = data.rfind(b"\n") + 1
    if form == "jsonl" or separation == "line":
        return line_end, False
    if separation == "blank":
        blank = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
        if blank > 4:
            return blank, False
    return line_end, True


def _of_values(found: Input, head: bytes, block_bytes: int) -> Iterator[Block]:
    """Objects of a JSON array, or of a file of objects over several lines: one line each, under their line numbers.

    What is no JSON becomes the last line, for the worker to report: nothing behind it can be told apart.
    """
    decoder = json.JSONDecoder()
    unfinished = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, line, size = unfinished.decode(head), 1, 0
    values: list[bytes] = []
    lines: list[int] = []
    is_done = False
    while not is_done:
        place = 0
        while True:
            start = _skip(text, place)
            line += text.count("\n", place, start)
            place = start
            if place == len(text):
                break
            try:
                value, end = decoder.raw_decode(text, place)
            except ValueError:
                break
            values.append(json.dumps(value).encode())  # ASCII: a broken byte stays visible as a lone surrogate
            lines.append(line)
            size += len(values[-1])
            line += text.count("\n", place, end)
            place = end
            if size >= block_bytes:
                yield Block(0, "", "jsonl", lines[0], b"\n".join(values), tuple(lines))
                values, lines, size = [], [], 0
        text = text[place:]
        more = found.read(max(block_bytes, len(text)))  # doubled, so that a huge value costs no square
        text += unfinished.decode(more, final=not more)
        is_done = not more
    if text.strip("] \t\r\n"):
        values.append(text.strip().split("\n", 1)[0].encode("utf-8", "surrogateescape"))
        lines.append(line)
    if values:
        yield Block(0, "", "jsonl", lines[0], b"\n".join(values), tuple(lines))


def _skip(text: str, place: int) -> int:
    """The next place that can begin a value: blanks, commas and the array's brackets are passed over."""
    while place < len(text) and text[place] in " \t\r\n,[":
        place += 1
    return place
