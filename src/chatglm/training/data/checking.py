"""`chatglm data check`: everything that is wrong with a corpus, before anything is made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from chatglm.tokenizer import Tokenizer

from .blocks import blocks_of
from .encoding import Reading, digest, records_of
from .formats import BadRecordError, Dialogue, Preference, Record, Text
from .inputs import Form, expand, open_inputs, total_bytes
from .layout import Layout, answer_samples
from .preferences import Judged, described, find_problems, language, prompt_key
from .problems import Findings, Problem

Progress = Callable[[int, int, str], None]


@dataclass
class Checked:
    """What was found. `records` that were read, good or bad; `problems` all of them, in the order of the corpus."""

    records: int = 0
    texts: int = 0
    dialogues: int = 0
    rounds: int = 0
    judged: list[Judged] = field(default_factory=list)
    languages: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def findings(self) -> Findings:
        found = Findings()
        found.add(self.problems)
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "texts": self.texts,
            "dialogues": self.dialogues,
            "rounds": self.rounds,
            "preferences": described(self.judged) if self.judged else None,
            "languages": dict(self.languages),
            "sources": len(self.sources),
            "counts": dict(self.findings.counts),
            "problems": [problem.as_dict() for problem in self.problems],
        }


def check(
    paths: Sequence[str],
    reading: Reading,
    *,
    tokenizer: Tokenizer | None = None,
    layout: Layout | None = None,
    form: Form | None = None,
    against: Sequence[str] = (),
    progress: Progress | None = None,
) -> Checked:
    """Read a corpus to its end and note every problem.

    tokenizer  with `layout`: answers are measured against the length of a sample
    against    evaluation sets: no prompt of theirs may be in the corpus
    Memory grows with the records (about 200 bytes each, judged pairs whole). Raises TrainingError only for files that
    cannot be read.
    """
    evaluation = frozenset(key for _, _, record in _records(against, reading, form) for key in _prompts(record))
    out = Checked()
    seen: dict[int, tuple[str, int]] = {}
    asked: dict[int, tuple[str, int]] = {}
    for file, line, record in _records(paths, reading, form, progress):
        out.records += 1
        if isinstance(record, Problem):
            out.problems.append(record)
            continue
        out.sources[getattr(record, "source", "") or file] += 1
        out.languages[language(_sample_of(record))] += 1
        if isinstance(record, Preference):
            out.judged.append(Judged(record, file, line))
            continue
        out.problems += _repetition(record, file, line, seen, asked)
        if isinstance(record, Text):
            out.texts += 1
            continue
        out.dialogues += 1
        out.rounds += len(record.rounds)
        if any(key in evaluation for key in _prompts(record)):
            out.problems.append(Problem("leakage", file, line, "its prompt is in the evaluation set"))
        if tokenizer is not None and layout is not None:
            out.problems += _too_long(record, file, line, tokenizer, layout)
    out.problems += find_problems(out.judged, evaluation)
    return out


def _records(
    paths: Sequence[str], reading: Reading, form: Form | None, progress: Progress | None = None
) -> Iterator[tuple[str, int, Record | Problem]]:
    files = expand(paths)
    total = total_bytes(files)
    for block in blocks_of(open_inputs(files, form), reading.separation):
        for line, record in records_of(block, reading):
            yield block.file, line, record
        if progress is not None:
            progress(block.consumed, total or block.consumed, "checking")


def _prompts(record: Record | Problem) -> list[str]:
    """Keys of what is asked: every round of a dialogue is a question that could leak."""
    if isinstance(record, Preference):
        return [prompt_key(record.prompt, record.history)]
    if isinstance(record, Dialogue):
        rounds = record.rounds
        return [prompt_key(question, rounds[:number]) for number, (question, _) in enumerate(rounds)]
    return []


def _sample_of(record: Record) -> str:
    """Text that tells the language."""
    if isinstance(record, Text):
        return record.text[:200]
    return record.prompt if isinstance(record, Preference) else record.rounds[0][0][:200]


def _repetition(
    record: Text | Dialogue, file: str, line: int, seen: dict[int, tuple[str, int]], asked: dict[int, tuple[str, int]]
) -> Iterator[Problem]:
    if isinstance(record, Text):
        question, whole = None, digest(f"text\x00{record.text}")
    else:
        said = "\x00".join([record.system or "", *(part for pair in record.rounds for part in pair)])
        question, whole = digest(said.rpartition("\x00")[0]), digest(said)
    place = (file, line)
    earlier = seen.setdefault(whole, place)
    if earlier is not place:
        yield Problem("duplicate", file, line, f"is the same as {earlier[0]}, line {earlier[1]}")
    elif question is not None:
        first = asked.setdefault(question, place)
        if first is not place:
            message = f"asks the same and answers otherwise than {first[0]}, line {first[1]}"
            yield Problem("contradiction", file, line, message)


def _too_long(record: Dialogue, file: str, line: int, tokenizer: Tokenizer, layout: Layout) -> Iterator[Problem]:
    try:
        for _ in answer_samples(tokenizer, record, layout):
            pass
    except BadRecordError as error:
        yield Problem(error.kind, file, line, str(error))
