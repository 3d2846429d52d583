"""Preference pairs as rows of the common loop: both answers of a pair always in one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..samples import Batch, Sample
from .answers import one_a_row
from .preferences import Pair


@dataclass(frozen=True)
class PairBatch:
    """Answers one a row: chosen, rejected, chosen, …

    margins    fp32 [pairs]
    reference  fp32 [2 * pairs]: log-probability of each answer under the reference, where that is wanted
    """

    batch: Batch
    margins: Tensor
    reference: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.batch.tokens

    def to(self, device: torch.device | str) -> PairBatch:
        reference = None if self.reference is None else self.reference.to(device)
        return replace(self, batch=self.batch.to(device), margins=self.margins.to(device), reference=reference)


@dataclass(frozen=True)
class PairSource:
    """Pairs by number, in another order each epoch.

    rows       makes the two samples of a pair, chosen first
    reference  fp32 [pairs, 2], by the place of a pair in `pairs`
    shuffle    off for held-out pairs
    """

    pairs: Sequence[Pair]
    rows: Callable[[Pair], list[Sample]]
    seed: int = 0
    reference: Tensor | None = None
    shuffle: bool = True

    @property
    def rows_per_epoch(self) -> int:
        return len(self.pairs)

    def batch(self, start: int, count: int) -> PairBatch:
        """Pairs start … start + count - 1 of the endless order."""
        places = [self._place(number) for number in range(start, start + count)]
        picked = [self.pairs[place] for place in places]
        reference = None if self.reference is None else self.reference[places].flatten()
        return PairBatch(
            one_a_row(sample for pair in picked for sample in self.rows(pair)),
            torch.tensor([pair.margin for pair in picked]),
            reference,
        )

    def _place(self, number: int) -> int:
        epoch, index = divmod(number, len(self.pairs))
        return int(permutation(len(self.pairs), self.seed, epoch)[index]) if self.shuffle else index


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """0 … count - 1 in the order of an epoch; a pure function, the last few are kept."""
    key = (count, seed, epoch)
    if key not in _orders:
        if len(_orders) >= 8:
            _orders.pop(next(iter(_orders)))
        _orders[key] = np.random.Generator(np.random.Philox(key=seed, counter=epoch)).permutation(count)
    return _orders[key]
