"""What training reads: samples of the prefix-LM layout, packed into rows, collated into batches of tensors.

Layout of one sample (spec/training.md §1.1): part A, the context that every token sees, then part B, the tokens that
are generated. Targets are not shifted: input `i` predicts target `i`, so `sop` predicts the first token and the last
predicts `eop`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chatglm.errors import TrainingError

IGNORE = -100
"""Target of a position without loss."""
PADDING = -1
"""`document` of a padding position."""

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Sample:
    """One document as the model sees it.

    `ids` and `targets` [tokens]; `positions` [2, tokens], row 0 the position, row 1 the block position (1-D encodings
    read row 0); `context_length` = |A|. `cut_targets` counts targets that a length limit took away.
    """

    ids: IntArray
    targets: IntArray
    positions: IntArray
    context_length: int
    objective: str
    source: str = ""
    cut_targets: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())


@dataclass(frozen=True)
class Batch:
    """Rows of packed samples: all [batch, tokens], but `positions` [batch, 2, tokens].

    `document` numbers the samples of a row from 0, -1 is padding. Query i sees key j if both are of one document and
    `in_context[j] or j <= i`.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    document: Tensor
    in_context: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.document != PADDING).sum())

    @property
    def loss_tokens(self) -> int:
        """Positions that have a target."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def rows(self, start: int, stop: int) -> Batch:
        """A part of the batch, for accumulation and for processes."""
        return replace(self, **{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})


def pack(samples: Iterable[Sample], length: int) -> list[list[Sample]]:
    """Rows of at most `length` tokens, filled greedily in order: the first open row with room takes a sample.

    Raises:
        TrainingError: a sample alone is longer than a row.
    """
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        if len(sample) > length:
            raise TrainingError(
                f"a sample of {len(sample)} tokens does not fit a row of {length}",
                cure="cut the text, or raise the sequence length",
            )
        place = next((i for i, free in enumerate(room) if free >= len(sample)), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(length)
        rows[place].append(sample)
        room[place] -= len(sample)
    return rows


def collate(rows: Sequence[Sequence[Sample]], length: int | None = None) -> Batch:
    """Tensors of packed rows, padded to `length` (default: the longest row): id 0, no target, position 0."""
    width = length if length is not None else max(sum(map(len, row)) for row in rows)
    shape = (len(rows), width)
    ids = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    positions = np.zeros((len(rows), 2, width), dtype=np.int64)
    document = np.full(shape, PADDING, dtype=np.int32)
    in_context = np.zeros(shape, dtype=np.bool_)
    for number, row in enumerate(rows):
        start = 0
        for index, sample in enumerate(row):
            stop = start + len(sample)
            if stop > width:
                raise TrainingError(f"a row holds {sum(map(len, row))} tokens, more than its length of {width}")
            ids[number, start:stop] = sample.ids
            targets[number, start:stop] = sample.targets
            positions[number, :, start:stop] = sample.positions
            document[number, start:stop] = index
            in_context[number, start : start + sample.context_length] = True
            start = stop
    return Batch(*(torch.from_numpy(part) for part in (ids, targets, positions, document, in_context)))
