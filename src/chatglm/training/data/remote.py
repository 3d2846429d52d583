"""Corpora that are larger than the disk, or elsewhere: read through `datasets`, tokenised as they come.

The same interface as of prepared sets: row i is the same for any world size and after any restart. The corpus is cut in
lanes, row i belongs to lane i mod lanes, and a process opens only the lanes of its rows. Going back or resuming reads a
lane again from its beginning, at the tokenizer's speed: what fits the disk is better prepared once.

    datasets:NAME?name=CONFIG&split=train&data_files=PATTERN&tokenizer=FOLDER&lanes=8&shuffle=1000
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote

import numpy as np
import numpy.typing as npt

from chatglm.errors import MissingExtraError, TrainingError
from chatglm.tokenizer import Tokenizer

from ..objective import Objective, generator
from ..samples import Sample
from .formats import BadRecordError, Columns, Dialogue, Record, Text, parse
from .layout import Layout, answer_samples
from .preparing import open_tokenizer
from .problems import Allowance, Findings, Problem
from .streams import answer_sample

PREFIX = "datasets:"
ENDLESS = 1 << 40
"""Rows of an epoch of a corpus whose size is not known."""


class Sharded(Protocol):
    """What is asked of a corpus; `datasets.IterableDataset` has it."""

    @property
    def num_shards(self) -> int: ...

    def shard(self, num_shards: int, index: int) -> Iterable[dict[str, Any]]: ...


@dataclass(frozen=True)
class Remote:
    """A corpus by name and options. columns: as for `chatglm data prepare`; shuffle: records mixed in each lane."""

    path: str
    name: str | None = None
    split: str = "train"
    data_files: str | None = None
    tokenizer: str | None = None
    lanes: int | None = None
    shuffle: int = 1000
    columns: Columns = field(default_factory=Columns)

    @classmethod
    def parse(cls, words: str) -> Remote:
        """From `datasets:NAME?key=value&…`. Raises TrainingError for an unknown key or a number that is none."""
        path, _, query = words.removeprefix(PREFIX).partition("?")
        given = dict(parse_qsl(query, keep_blank_values=True))
        columns = Columns(*(given.pop(f"{key}_column", None) for key in ("prompt", "response", "history")))
        numbers: dict[str, int] = {}
        try:
            for key in ("lanes", "shuffle"):
                if key in given:
                    numbers[key] = int(given.pop(key))
            return cls(unquote(path), columns=columns, **given, **numbers)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            known = "name, split, data_files, tokenizer, lanes, shuffle, prompt_column, response_column, history_column"
            raise TrainingError(f"{words}: {error}", cure=f"known keys: {known}") from error

    def open(self) -> Sharded:
        """The corpus, nothing of it read yet. Raises MissingExtraError without `datasets`."""
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError as error:
            raise MissingExtraError("datasets", extra="data", purpose="streaming a corpus") from error
        try:
            found: Sharded = datasets.load_dataset(
                self.path, self.name, split=self.split, data_files=self.data_files, streaming=True
            )
        except (OSError, ValueError) as error:
            raise TrainingError(f"{PREFIX}{self.path} cannot be opened ({error})") from error
        return found


@dataclass
class _Lane:
    """One part of the corpus while it is read; `done` rows were given out."""

    rows: Iterator[list[Sample]]
    done: int = 0


class RemoteStream:
    """Rows of a streamed corpus: texts joined and cut as in TextStream, answers packed in the order they come."""

    rows_per_epoch = ENDLESS

    def __init__(
        self,
        corpus: Sharded,
        tokenizer: Tokenizer,
        objective: Objective,
        *,
        length: int,
        seed: int,
        lanes: int | None = None,
        shuffle: int = 1000,
        columns: Columns | None = None,
        allowance: Allowance | None = None,
        name: str = "stream",
    ) -> None:
        """lanes: parts that are read beside each other [as many as the corpus has files, at most 64]."""
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.objective = objective
        self.length = length
        self.seed = seed
        self.lanes = lanes or max(1, min(64, corpus.num_shards))
        if self.lanes > corpus.num_shards:
            raise TrainingError(
                f"{name} has {corpus.num_shards} files, which cannot be read in {self.lanes} lanes",
                cure=f"use lanes={corpus.num_shards} or fewer",
            )
        self.shuffle = max(1, shuffle)
        self.columns = columns
        self.allowance = allowance or Allowance()
        self.findings = Findings()
        self.name = name
        self._layout = Layout(length)
        self._open: dict[int, _Lane] = {}

    def row(self, index: int) -> list[Sample]:
        """See Stream."""
        wanted, number = divmod(index, self.lanes)
        lane = self._open.get(number)
        if lane is None or lane.done > wanted:
            lane = self._open[number] = _Lane(self._rows(number))
        for row in lane.rows:
            lane.done += 1
            if lane.done > wanted:
                return row
        raise AssertionError("a lane never ends")

    def _rows(self, lane: int) -> Iterator[list[Sample]]:
        """All rows of a lane, epoch after epoch."""
        text: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
        waiting: list[Sample] = []
        row = 0
        while True:
            before = row
            read = 0
            for record in self._shuffled(lane, row):
                read += 1
                if isinstance(record, Text):
                    ids = [*self.tokenizer.encode(record.text), self.objective.ids.end_of_text]
                    text = np.concatenate([text, np.array(ids, dtype=np.int32)])
                    while True:
                        random = generator(self.seed, 0, row * self.lanes + lane, 6)
                        mode = self.objective.draw_mode(random)
                        size = self.objective.text_length(mode, self.length)
                        if len(text) < size:
                            break
                        yield self.objective.samples(text[:size], mode, self.length, random)
                        text, row = text[size:], row + 1
                elif isinstance(record, Dialogue):
                    for sample in self._answers(record):
                        if sum(map(len, waiting)) + len(sample) > self.length:
                            yield waiting
                            waiting, row = [], row + 1
                        waiting.append(sample)
            if waiting:
                yield waiting
                waiting, row = [], row + 1
            if not read or (row == before and len(text) == 0):
                raise TrainingError(f"{self.name}: lane {lane} of {self.lanes} holds no text and no dialogue")

    def _answers(self, dialogue: Dialogue) -> Iterator[Sample]:
        encoding, sop = self.objective.encoding, self.objective.ids.sop
        try:
            for found in answer_samples(self.tokenizer, dialogue, self._layout):
                yield answer_sample(np.array(found.ids, dtype=np.int32), found.context_length, sop, encoding)
        except BadRecordError as error:
            self._pass_over(Problem(error.kind, self.name, 0, str(error)))

    def _shuffled(self, lane: int, row: int) -> Iterator[Record]:
        """Records in a random order within a window, from (seed, lane, first row) alone."""
        random = generator(self.seed, row, lane, 7)
        window: list[Record] = []
        for record in self._records(lane):
            if len(window) < self.shuffle:
                window.append(record)
                continue
            place = int(random.integers(0, self.shuffle))
            yield window[place]
            window[place] = record
        for place in random.permutation(len(window)).tolist():
            yield window[place]

    def _records(self, lane: int) -> Iterator[Record]:
        for number, found in enumerate(self.corpus.shard(self.lanes, lane), start=1):
            try:
                yield parse({key: value for key, value in found.items() if value is not None}, self.columns)
            except BadRecordError as error:
                self._pass_over(Problem(error.kind, f"{self.name}, lane {lane}", number, str(error)))

    def _pass_over(self, problem: Problem) -> None:
        self.findings.add([problem])
        self.findings.raise_if_stopping(self.allowance)


def open_remote(
    words: str,
    objective: Objective,
    *,
    length: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    allowance: Allowance | None = None,
) -> RemoteStream:
    """The stream of `datasets:…`. Raises TrainingError where no tokenizer is named."""
    remote = Remote.parse(words)
    return RemoteStream(
        remote.open(),
        remote_tokenizer(words, tokenizer),
        objective,
        length=length,
        seed=seed,
        lanes=remote.lanes,
        shuffle=remote.shuffle,
        columns=remote.columns,
        allowance=allowance,
        name=words.partition("?")[0],
    )


def remote_tokenizer(words: str, tokenizer: Tokenizer | None = None) -> Tokenizer:
    """The one that is given, or the one that the words name."""
    if tokenizer is not None:
        return tokenizer
    named = Remote.parse(words).tokenizer
    if named is None:
        raise TrainingError(f"{words}: a streamed corpus needs a tokenizer", cure="add `&tokenizer=FOLDER`")
    return open_tokenizer(named)
