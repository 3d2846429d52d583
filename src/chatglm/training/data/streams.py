"""Prepared sets → rows for training. Row i is a pure function of (seed, i): any world size, worker or restart sees the
same stream, and how far a run has come is one number, the rows consumed.

`TextStream` cuts the joined texts into rows, as GLM-130B does; `PackedStream` packs whole samples (dialogues, or texts
that stay apart) into rows. Both read every row once before an epoch ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from chatglm.errors import TrainingError

from ..objective import Objective, generator
from ..objective.sampling import TEXT_SHARE
from ..samples import IGNORE, Sample
from .order import permutation
from .packing import PackingPlan, plan_rows
from .prepared import Collection

MODES = ("token", "sentence", "document")
_CHUNK = 4096
_KEPT_CHUNKS = 256  # 8 MB


class Stream(Protocol):
    """Rows of packed samples. `length` tokens a row at most; `rows_per_epoch` rows until everything was read once."""

    @property
    def length(self) -> int: ...

    @property
    def rows_per_epoch(self) -> int: ...

    def row(self, index: int) -> list[Sample]:
        """The samples of row `index`, which counts on over epochs."""
        ...


def rows_of(stream: Stream, start: int, count: int, *, rank: int = 0, world_size: int = 1) -> Iterator[list[Sample]]:
    """One process's share of the next `count` rows: rows `start + rank`, `start + rank + world_size`, …"""
    for index in range(start + rank, start + count, world_size):
        yield stream.row(index)


class TextStream:
    """Joined texts, each with its end, cut into rows; which objective a row has is drawn by the mixture's shares.

    A row of the token objective takes fewer tokens of text than one of the document objective, so rows begin at places
    that depend on the modes before. Modes are drawn once by the seed; every epoch turns them on against the text, and
    has its own order of rows.
    """

    def __init__(
        self,
        texts: Collection,
        objective: Objective,
        *,
        length: int,
        seed: int,
        sources: list[str] | None = None,
        tokens: tuple[int, int] | None = None,
    ) -> None:
        """tokens: the part of the texts that is read, from one id to another [all].

        Raises TrainingError where there is no text.
        """
        self.first, self.stop = (0, texts.tokens) if tokens is None else tokens
        if self.stop - self.first < 2:
            raise TrainingError(f"{texts.folder}: there is no text to train on", cure="prepare more plain text")
        self.texts = texts
        self.objective = objective
        self.length = length
        self.seed = seed
        self.sources = sources
        self._sizes = np.array([objective.text_length(mode, length) for mode in MODES], dtype=np.int64)
        self._begins = [0]  # where each chunk of modes begins in the text
        self._recent: dict[int, npt.NDArray[np.int64]] = {}
        self._count = self._draw_all()

    @property
    def rows_per_epoch(self) -> int:
        return self._count

    def row(self, index: int) -> list[Sample]:
        """See Stream."""
        epoch, place = divmod(index, self._count)
        number = permutation(self._count, self.seed, epoch)(place)
        mode, start, size = self._place(epoch, number)
        text = self.texts.ids(start, min(start + size, self.stop))
        samples = self.objective.samples(text, mode, self.length, generator(self.seed, epoch, number))
        if self.sources is None:
            return samples
        document = int(np.searchsorted(self.texts.offsets, start, side="right")) - 1
        return [replace(sample, source=self.sources[int(self.texts.sources[document])]) for sample in samples]

    def _modes(self, chunk: int) -> npt.NDArray[np.int64]:
        """Modes of the rows `chunk · 4096 …`, as indices of MODES."""
        if chunk not in self._recent:
            mixture = self.objective.mixture
            draws = generator(self.seed, 0, chunk, 2).random(_CHUNK)
            if len(self._recent) >= _KEPT_CHUNKS:
                self._recent.clear()
            shares = [mixture.token, mixture.token + mixture.sentence]
            self._recent[chunk] = np.searchsorted(shares, draws, side="right")
        return self._recent[chunk]

    def _draw_all(self) -> int:
        """Number of whole rows that the text holds; a text shorter than a row is one."""
        chunk = 0
        while True:
            ends = self._begins[-1] + np.cumsum(self._sizes[self._modes(chunk)])
            if ends[-1] > self.stop - self.first:
                whole = int(np.searchsorted(ends, self.stop - self.first, side="right"))
                return max(1, chunk * _CHUNK + whole)
            self._begins.append(int(ends[-1]))
            chunk += 1

    def _begin(self, number: int) -> tuple[int, int]:
        """Where row `number` begins before the epoch turns them, and its mode."""
        chunk, inside = divmod(number, _CHUNK)
        modes = self._modes(chunk)
        return self._begins[chunk] + int(self._sizes[modes[:inside]].sum()), int(modes[inside])

    def _place(self, epoch: int, number: int) -> tuple[str, int, int]:
        """Mode, first token and number of tokens of a row."""
        random = generator(self.seed, epoch, 0, 3)
        turn = int(random.integers(0, self._count))
        last, last_mode = self._begin(self._count - 1)
        total = last + int(self._sizes[last_mode])
        shift = int(random.integers(0, max(1, self.stop - self.first - total + 1)))
        begin, mode = self._begin(number)
        first, _ = self._begin(turn)
        return MODES[mode], self.first + shift + (begin - first) % max(total, 1), int(self._sizes[mode])

    def split(self, rows: int) -> tuple[TextStream, TextStream]:
        """The beginning of the texts for training, and the end, about `rows` rows, held out: no token is in both."""
        border = self.stop - min(rows * self.length, self.stop - self.first)
        return self._part(self.first, border), self._part(border, self.stop)

    def _part(self, first: int, stop: int) -> TextStream:
        return TextStream(
            self.texts,
            self.objective,
            length=self.length,
            seed=self.seed,
            sources=self.sources,
            tokens=(first, stop),
        )


class PackedStream:
    """Whole samples, packed into rows once; every epoch has its own order of rows and its own random numbers."""

    def __init__(
        self, pieces: Pieces, *, length: int, seed: int, plan: PackingPlan | None = None, rows: range | None = None
    ) -> None:
        """plan, rows: the packing and those of its rows that are read [made here, all].

        Raises TrainingError where no sample fits a row.
        """
        self.pieces = pieces
        self.length = length
        self.seed = seed
        self.plan = plan_rows(pieces.lengths, length, seed) if plan is None else plan
        self.rows = range(len(self.plan)) if rows is None else rows
        if not len(self.rows):
            raise TrainingError(
                f"none of {len(pieces.lengths):,} samples fits a row of {length} tokens",
                cure="raise the length of rows",
            )

    @property
    def rows_per_epoch(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> list[Sample]:
        """See Stream."""
        epoch, place = divmod(index, len(self.rows))
        number = self.rows[permutation(len(self.rows), self.seed, epoch)(place)]
        return [self.pieces.sample(piece, self.seed, epoch) for piece in self.plan.row(number)]

    def split(self, rows: int) -> tuple[PackedStream, PackedStream]:
        """All rows but the last `rows` for training, and those held out."""
        border = self.rows.stop - min(rows, len(self.rows))
        return self._part(range(self.rows.start, border)), self._part(range(border, self.rows.stop))

    def _part(self, rows: range) -> PackedStream:
        return PackedStream(self.pieces, length=self.length, seed=self.seed, plan=self.plan, rows=rows)


class Pieces(Protocol):
    """Samples that are packed whole: their lengths (upper bounds) beforehand, one at a time later."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...

    def sample(self, number: int, seed: int, epoch: int) -> Sample: ...


@dataclass(frozen=True)
class AnswerPieces:
    """The samples of dialogues. `official`: with the target at `[gMASK]` that the original script trains."""

    dialogues: Collection
    sop: int
    encoding: str = "2d"
    official: bool = False
    sources: list[str] | None = None

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return self.dialogues.lengths

    def sample(self, number: int, seed: int, epoch: int) -> Sample:
        ids = self.dialogues.document(number)
        source = self.sources[int(self.dialogues.sources[number])] if self.sources else ""
        return answer_sample(
            ids, int(self.dialogues.contexts[number]), self.sop, self.encoding, official=self.official, source=source
        )


def answer_sample(
    ids: npt.NDArray[np.int32],
    context_length: int,
    sop: int,
    encoding: str = "2d",
    *,
    official: bool = False,
    source: str = "",
) -> Sample:
    """The sample of `context … [gMASK] | answer … eop`: sop and the answer stand at `[gMASK]`, block 1, 2, …

    The loss is from sop → first token to last token → eop; `official` adds `[gMASK]` → sop.
    """
    answer = ids[context_length:]
    inputs = np.concatenate([ids[:context_length], [sop], answer[:-1]]).astype(np.int32)
    targets = np.concatenate([np.full(context_length, IGNORE), answer]).astype(np.int32)
    if official:
        targets[context_length - 1] = sop
    index = np.arange(len(ids), dtype=np.int32)
    block = np.maximum(index - context_length + 1, 0)
    position = index if encoding == "1d" else np.minimum(index, context_length - 1)
    return Sample(inputs, targets, np.stack((position, block)), context_length, "dialogue", source)


class TextPieces:
    """Texts that stay apart: short ones whole, long ones in parts that fit a row. Objectives are drawn once."""

    def __init__(
        self, texts: Collection, objective: Objective, *, length: int, seed: int, sources: list[str] | None = None
    ) -> None:
        self.texts = texts
        self.objective = objective
        self.sources = sources
        mixture, lengths = objective.mixture, texts.lengths
        draws = np.random.default_rng((seed, len(lengths), 4)).random(len(lengths))
        modes = np.searchsorted([mixture.token, mixture.token + mixture.sentence], draws, side="right")
        rooms = np.array([_masked_room(length), _masked_room(length), objective.text_length("document", length)])
        parts = -(-lengths // rooms[modes])
        self._documents = np.repeat(np.arange(len(lengths)), parts)
        inside = np.arange(len(self._documents)) - np.repeat(np.cumsum(parts) - parts, parts)
        self._modes, room = modes[self._documents], rooms[modes][self._documents]
        self._starts = texts.offsets[:-1][self._documents] + inside * room
        self._stops = np.minimum(self._starts + room, texts.offsets[1:][self._documents])
        tokens = self._stops - self._starts
        own = np.where(self._modes < 2, _with_masks(tokens), tokens + objective.document_overhead)
        self.lengths = np.minimum(own, length)

    def sample(self, number: int, seed: int, epoch: int) -> Sample:
        text = self.texts.ids(int(self._starts[number]), int(self._stops[number]))
        mode = MODES[int(self._modes[number])]
        random = generator(seed, epoch, number)
        sample = self.objective.sample(text, mode, random, limit=int(self.lengths[number]))
        if self.sources is None:
            return sample
        return replace(sample, source=self.sources[int(self.texts.sources[int(self._documents[number])])])


def _with_masks(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Room for a text with the masks and starts of its spans: 1.1 times its own and some more."""
    return (tokens / TEXT_SHARE).astype(np.int64) + 8


def _masked_room(length: int) -> int:
    """Tokens of text for which `_with_masks` gives at most `length`."""
    return max(1, int((length - 8) * TEXT_SHARE))
