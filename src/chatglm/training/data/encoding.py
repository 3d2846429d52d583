"""What a worker does: one block of records → ids, counts and problems. No tensor library is imported for it."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from chatglm.tokenizer import Tokenizer

from .blocks import Block, Separation
from .formats import BadRecordError, Columns, Dialogue, Preference, Record, Text, parse
from .layout import Layout, answer_samples
from .problems import Problem

_LOST = re.compile("[\ufffd\ud800-\udfff]")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")  # two line ends: _SEPARATOR_LINES counts on it


@dataclass(frozen=True)
class Reading:
    """How bytes become records.

    encoding     of the files
    columns      fields of a format of its own
    separation   what ends a document of a plain text
    leave_out    patterns of source names whose records are not wanted
    """

    encoding: str = "utf-8"
    columns: Columns = field(default_factory=Columns)
    separation: Separation = "file"
    leave_out: tuple[str, ...] = ()


@dataclass
class Encoded:
    """A block in ids, as lists that grow: one entry a sample, one entry a record.

    A text is a record with one sample; a dialogue has a sample for each answer.
    `whole` and `asked` are hashes of a record and of what it asks, for finding duplicates and contradictions.
    """

    text_ids: array[int] = field(default_factory=lambda: array("i"))
    text_lengths: list[int] = field(default_factory=list)
    answer_ids: array[int] = field(default_factory=lambda: array("i"))
    answer_lengths: list[int] = field(default_factory=list)
    context_lengths: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    is_text: list[bool] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    source_names: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    left_out: int = 0
    dropped_rounds: int = 0
    is_continued: bool = False

    def arrays(self) -> dict[str, np.ndarray]:
        """What a block file keeps, by name."""
        kinds = {"whole": np.uint64, "asked": np.uint64, "is_text": np.bool_, "lines": np.int64, "num_bytes": np.int64}
        names = (
            "text_ids",
            "text_lengths",
            "answer_ids",
            "answer_lengths",
            "context_lengths",
            "samples",
            "sources",
            *kinds,
        )
        return {name: np.array(getattr(self, name), dtype=kinds.get(name, np.int32)) for name in names}


def digest(text: str) -> int:
    """64 bits of a text: two of ten million differ by luck with probability 1 - 3e-6."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def records_of(block: Block, reading: Reading) -> Iterator[tuple[int, Record | Problem]]:
    """Line and record, or what is wrong with it, of everything in a block."""
    if block.form == "text":
        yield from _texts(block, reading)
        return
    numbers = iter(block.lines or ())
    for offset, raw in enumerate(block.data.split(b"\n")):
        line = next(numbers, 0) if block.lines else block.first_line + offset
        if raw.strip():
            yield line, _record(raw, block.file, line, reading)


def _record(raw: bytes, file: str, line: int, reading: Reading) -> Record | Problem:
    try:
        text = raw.decode(reading.encoding)
    except UnicodeDecodeError as error:
        return Problem("encoding", file, line, _undecodable(raw, error, reading.encoding))
    try:
        record = parse(json.loads(text), reading.columns)
    except json.JSONDecodeError as error:
        return Problem("json", file, line, f"not JSON: {error.msg} at column {error.colno}")
    except BadRecordError as error:
        return Problem(error.kind, file, line, str(error))
    except RecursionError:
        return Problem("json", file, line, "not JSON that can be read: it is nested too deeply")
    lost = next((match[0] for part in _strings(record) if (match := _LOST.search(part))), None)
    return record if lost is None else Problem("encoding", file, line, _lost(lost))


def _lost(character: str) -> str:
    return f"holds U+{ord(character):04X}, a character that an earlier conversion lost"


def _undecodable(raw: bytes, error: UnicodeDecodeError, encoding: str) -> str:
    found = f"byte 0x{raw[error.start]:02X} at column {error.start + 1} is not {encoding.upper()}"
    for other in ("gb18030", "big5", "utf-8"):
        try:
            raw.decode(other)
        except UnicodeDecodeError:
            continue
        return f"{found}; as {other} the line can be read (`--encoding {other}`)"
    return found


def _strings(record: Record) -> Iterator[str]:
    if isinstance(record, Text):
        yield record.text
    elif isinstance(record, Dialogue):
        yield from (part for pair in record.rounds for part in pair)
        yield record.system or ""
    else:
        yield from (part for pair in record.history for part in pair)
        yield from (record.prompt, record.chosen, record.rejected)


def _texts(block: Block, reading: Reading) -> Iterator[tuple[int, Record | Problem]]:
    """Documents of a plain text; of one that is larger than a block, the part in this block."""
    line = block.first_line
    good: list[str] = []
    for offset, raw in enumerate(block.data.splitlines(keepends=True)):
        try:
            part = raw.decode(reading.encoding)
        except UnicodeDecodeError as error:
            yield (
                line + offset,
                Problem("encoding", block.file, line + offset, _undecodable(raw, error, reading.encoding)),
            )
            part = "\n"
        else:
            if match := _LOST.search(part):
                yield line + offset, Problem("encoding", block.file, line + offset, _lost(match[0]))
                part = "\n"
        good.append(part)
    text = "".join(good).replace("\r\n", "\n")
    begins = block.first_line == 1 or reading.separation != "file"
    documents = _separated(text, reading.separation)
    for number, document in enumerate(documents):
        blank = len(document) - len(document.lstrip())
        where = line + document.count("\n", 0, blank)
        line += document.count("\n") + _SEPARATOR_LINES[reading.separation]
        if document.strip():
            goes_on = block.is_continued and number == len(documents) - 1
            document = document.lstrip("\n") if begins or number else document
            yield where, Text(document if goes_on else document.rstrip("\n"))


_SEPARATOR_LINES = {"file": 0, "blank": 2, "line": 1}


def _separated(text: str, separation: Separation) -> list[str]:
    if separation == "line":
        return text.split("\n")
    return _BLANK_LINE.split(text) if separation == "blank" else [text]


def encode_block(block: Block, tokenizer: Tokenizer, layout: Layout, reading: Reading, end_of_text: int) -> Encoded:
    """Ids of all good records of a block; the others are problems."""
    out = Encoded(is_continued=block.is_continued)
    sources: dict[str, int] = {}
    for line, record in records_of(block, reading):
        if isinstance(record, Problem):
            out.problems.append(record)
            continue
        if isinstance(record, Preference) and record.label != "correction":
            message = "a judged answer, which is data for `chatglm train reward`, not for texts and dialogues"
            out.problems.append(Problem("keys", block.file, line, message))
            continue
        source = record.source or block.file
        if any(fnmatch.fnmatchcase(source, pattern) for pattern in reading.leave_out):
            out.left_out += 1
            continue
        try:
            _encode_record(out, record, tokenizer, layout, end_of_text)
        except BadRecordError as error:
            out.problems.append(Problem(error.kind, block.file, line, str(error)))
            continue
        out.lines.append(line)
        out.sources.append(sources.setdefault(source, len(sources)))
    out.source_names = list(sources)
    if out.is_continued and not (out.text_ids and out.is_text[-1]):
        out.is_continued = False
    if out.is_continued:  # its end comes with a later block
        out.text_ids.pop()
        out.text_lengths[-1] -= 1
    return out


def _encode_record(out: Encoded, record: Record, tokenizer: Tokenizer, layout: Layout, end_of_text: int) -> None:
    if isinstance(record, Text):
        ids = tokenizer.encode(record.text)
        out.text_ids.extend([*ids, end_of_text])
        out.text_lengths.append(len(ids) + 1)
        whole = asked = digest(record.text)
        samples, num_bytes = 1, len(record.text.encode("utf-8", "replace"))
    else:
        dialogue = record if isinstance(record, Dialogue) else _corrected(record)
        found = list(answer_samples(tokenizer, dialogue, layout))
        for sample in found:
            out.answer_ids.extend(sample.ids)
            out.answer_lengths.append(len(sample.ids))
            out.context_lengths.append(sample.context_length)
            out.dropped_rounds += sample.dropped_rounds > 0
        asked_text = "\x00".join((dialogue.system or "", *_asked(dialogue)))
        asked, whole = digest(asked_text), digest(f"{asked_text}\x00{dialogue.rounds[-1][1]}")
        samples = len(found)
        answers = dialogue.rounds if layout.every_answer and not layout.official else dialogue.rounds[-1:]
        num_bytes = sum(len(answer.encode("utf-8", "replace")) for _, answer in answers)
    out.samples.append(samples)
    out.is_text.append(isinstance(record, Text))
    out.whole.append(whole)
    out.asked.append(asked)
    out.num_bytes.append(num_bytes)


def _asked(dialogue: Dialogue) -> Iterator[str]:
    """All that stands before the last answer."""
    *history, (question, _) = dialogue.rounds
    for asked, answered in history:
        yield asked
        yield answered
    yield question


def _corrected(record: Preference) -> Dialogue:
    """A correction teaches its better answer."""
    return Dialogue((*record.history, (record.prompt, record.chosen)), source=record.source, has_history=True)
