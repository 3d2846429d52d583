"""Samples of known lengths → full rows: best fit, decreasing, among a few thousand neighbours of a random order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 8192
"""Samples that are packed with one another: enough for rows that are 99% full, and no order by length."""


@dataclass(frozen=True)
class PackingPlan:
    """Which samples share a row: row r has `samples[starts[r] : starts[r + 1]]`. `left_out` were longer than a row."""

    starts: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]
    left_out: int
    filled: float

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> list[int]:
        """The samples of one row."""
        found: list[int] = self.samples[self.starts[number] : self.starts[number + 1]].tolist()
        return found


def plan_rows(
    lengths: Sequence[int] | npt.NDArray[np.int64], length: int, seed: int, window: int = WINDOW
) -> PackingPlan:
    """Rows of at most `length` tokens, from (lengths, seed) alone."""
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.random.default_rng((seed, len(sizes), length)).permutation(len(sizes))
    fitting = order[sizes[order] <= length]
    rows: list[list[int]] = []
    for start in range(0, len(fitting), window):
        part = fitting[start : start + window]
        rows += _best_fit(part[np.argsort(-sizes[part], kind="stable")].tolist(), sizes, length)
    counts = np.array([0, *map(len, rows)], dtype=np.int64)
    samples = np.array([sample for row in rows for sample in row], dtype=np.int64)
    filled = float(sizes[samples].sum() / max(1, len(rows) * length))
    return PackingPlan(np.cumsum(counts), samples, len(sizes) - len(fitting), filled)


def _best_fit(samples: list[int], sizes: npt.NDArray[np.int64], length: int) -> list[list[int]]:
    """Each sample, longest first, into the row with the least room that is enough."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r is set where a row with room r is open
    for sample in samples:
        size = int(sizes[sample])
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(sample)
        by_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows
