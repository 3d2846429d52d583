"""Several streams as one, in fixed shares; and a stream cut in a part for training and one that is held out."""

from __future__ import annotations

import numpy as np

from chatglm.errors import TrainingError

from ..objective import generator
from ..samples import Sample
from .streams import Stream


class MixedStream:
    """Rows of several streams in fixed shares: in every thousand rows each has its number, in a random order.

    Every stream goes through its own rows in its own order, so that nothing is read twice before its own epoch ends.
    """

    BLOCK = 1000

    def __init__(self, streams: list[Stream], weights: list[float], *, seed: int) -> None:
        """Raises TrainingError for weights that cannot be shares and rows of different lengths."""
        if len(streams) != len(weights) or not streams:
            raise TrainingError(f"{len(streams)} streams have {len(weights)} weights")
        if min(weights) < 0 or sum(weights) <= 0:
            raise TrainingError(f"weights {weights} are no shares", cure="give every set a weight of 0 or more")
        lengths = {stream.length for stream in streams}
        if len(lengths) > 1:
            raise TrainingError(f"the mixed streams have rows of {sorted(lengths)} tokens", cure="use one length")
        self.streams = streams
        self.seed = seed
        self.length = streams[0].length
        self._counts = _apportioned(weights, self.BLOCK)
        self._order = np.repeat(np.arange(len(streams)), self._counts)

    @property
    def shares(self) -> list[float]:
        """The share of the rows that each stream has, exact to a thousandth."""
        return [count / self.BLOCK for count in self._counts]

    @property
    def rows_per_epoch(self) -> int:
        """As many rows as the mixed streams have together (those with a weight)."""
        return sum(s.rows_per_epoch for s, count in zip(self.streams, self._counts, strict=True) if count)

    def which(self, index: int) -> tuple[int, int]:
        """The stream of row `index`, and the row in it."""
        block, place = divmod(index, self.BLOCK)
        order = generator(self.seed, 0, block, 5).permutation(self._order)
        stream = int(order[place])
        return stream, block * self._counts[stream] + int((order[:place] == stream).sum())

    def row(self, index: int) -> list[Sample]:
        """See Stream."""
        stream, inner = self.which(index)
        return self.streams[stream].row(inner)

    def split(self, rows: int) -> tuple[MixedStream, MixedStream]:
        """Every stream split, so that the held-out rows have the mixture's shares."""
        parts = [
            hold_out(stream, max(1, round(rows * share))) if share else (stream, stream)
            for stream, share in zip(self.streams, self.shares, strict=True)
        ]
        training = MixedStream([part[0] for part in parts], self.shares, seed=self.seed)
        return training, MixedStream([part[1] for part in parts], self.shares, seed=self.seed)


def hold_out(stream: Stream, rows: int) -> tuple[Stream, Stream]:
    """A stream without about `rows` of its rows, and those: no sample of the second is ever in the first.

    Leaving out the first rows of an epoch is not enough: the next epoch has them at other places.
    Raises TrainingError for a stream that cannot be split, or is too short.
    """
    split = getattr(stream, "split", None)
    if split is None:
        raise TrainingError("a streamed corpus has no rows to hold out", cure="prepare a held-out set of its own")
    if rows >= stream.rows_per_epoch:
        raise TrainingError(
            f"{rows} rows are to be held out, the data has {stream.rows_per_epoch} of {stream.length} tokens",
            cure="prepare more data, or hold out fewer rows",
        )
    found: tuple[Stream, Stream] = split(rows)
    return found


def _apportioned(weights: list[float], total: int) -> list[int]:
    """Whole numbers in these shares that sum to `total` (largest remainders); a weight above 0 gets at least 1."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [max(int(share), int(share > 0)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        candidates = by_remainder if step > 0 else [i for i in reversed(by_remainder) if counts[i] > 1]
        for index in candidates:
            if sum(counts) == total:
                break
            counts[index] += step
    return counts
