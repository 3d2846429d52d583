"""Prompted data sets in pre-training (multi-task instruction, MIP): `prompt + [MASK]` → answer and eop.

Source: GLM-130B §2.2 and Table 11: 5% of the tokens, at most 100,000 samples of a data set; spec/training.md §1.7.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..objective import SpecialIds, prompt_sample
from ..samples import Sample
from .prepared import Collection

MOST_PER_SOURCE = 100_000


class InstructionPieces:
    """Samples of a dialogue collection as instructions, each in a window of a quarter of a row, for PackedStream."""

    def __init__(
        self,
        dialogues: Collection,
        ids: SpecialIds,
        *,
        window: int,
        seed: int,
        encoding: str = "2d",
        sources: list[str] | None = None,
        most_per_source: int = MOST_PER_SOURCE,
    ) -> None:
        self.dialogues = dialogues
        self.ids = ids
        self.window = window
        self.encoding = encoding
        self.sources = sources
        self._chosen = _chosen(np.asarray(dialogues.sources), most_per_source, seed)
        self.lengths = np.minimum(dialogues.lengths[self._chosen], window)

    def sample(self, number: int, seed: int, epoch: int) -> Sample:
        document = int(self._chosen[number])
        ids, context = self.dialogues.document(document), int(self.dialogues.contexts[document])
        return prompt_sample(
            ids[: context - 1],  # without `[gMASK]`
            ids[context:-1],
            self.ids,
            mask=self.ids.mask,
            window=self.window,
            encoding="1d" if self.encoding == "1d" else "2d",
            source=self.sources[int(self.dialogues.sources[document])] if self.sources else "",
        )


def _chosen(sources: npt.NDArray[np.int32], most: int, seed: int) -> npt.NDArray[np.int64]:
    """Samples that are used: of each source at most so many, drawn by the seed."""
    order = np.random.default_rng((seed, len(sources), 8)).permutation(len(sources))
    by_source = order[np.argsort(sources[order], kind="stable")]
    starts = np.flatnonzero(np.diff(sources[by_source], prepend=-1))
    rank = np.arange(len(by_source)) - np.repeat(starts, np.diff(np.append(starts, len(by_source))))
    return np.sort(by_source[rank < most])
