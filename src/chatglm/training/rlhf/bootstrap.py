"""Feedback bootstrap: of several answers to a prompt the best is learned, if it is clearly better than usual.

Rejection sampling, best of n: no value model, no ratio, and a distance from the start that is bounded beforehand:
KL(best of n, policy) ≤ ln n - (n-1)/n nats an answer (Beirami et al. 2024). Source: spec/training.md §4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..samples import Batch, Sample, collate, pack
from ..task import Stream
from .pairs import permutation
from .rollout import Answer


def best_of_n_bound(answers: int) -> float:
    """Largest KL in nats an answer between the best of n answers and the policy that drew them."""
    return math.log(answers) - (answers - 1) / answers


@dataclass(frozen=True)
class Kept:
    """An answer that will be learned, what it scored, and the median of its prompt's answers."""

    answer: Answer
    score: float
    median: float


def keep_best(answers: Sequence[Answer], scores: Tensor, each: int, margin: float) -> list[Kept]:
    """Of each prompt the best finished answer, where it is above the median by more than `margin`.

    answers, scores  [prompts * each], one prompt's together. The same text for one prompt is kept once.
    """
    kept: list[Kept] = []
    for first in range(0, len(answers), each):
        own = scores[first : first + each].tolist()
        finished = [place for place in range(each) if answers[first + place].is_finished and answers[first + place].ids]
        if not finished:
            continue
        best = max(finished, key=lambda place: own[place])
        median = float(np.median(own))
        if own[best] > median + margin:
            kept.append(Kept(answers[first + best], own[best], median))
    return list({(one.answer.prompt.text, one.answer.text): one for one in kept}.values())


@dataclass(frozen=True)
class MixedRows:
    """Rows of kept answers and of known data, evenly mixed: a Source of the common loop.

    known_share  at least half, or the model forgets what it was not asked
    """

    kept: Sequence[Sequence[Sample]]
    known: Stream
    length: int
    known_share: float = 0.5
    seed: int = 0
    skip: int = 0

    @property
    def rows_per_epoch(self) -> int:
        return math.ceil(len(self.kept) / (1 - self.known_share)) if self.known_share < 1 else len(self.kept)

    def batch(self, start: int, count: int) -> Batch:
        """Rows start … start + count - 1 of the endless mixture."""
        return collate([self._row(number) for number in range(start, start + count)], self.length)

    def _row(self, number: int) -> list[Sample]:
        share = 1 - self.known_share
        before = math.floor(number * share)  # kept rows so far
        if math.floor((number + 1) * share) > before:
            epoch, place = divmod(before, len(self.kept))
            return list(self.kept[int(permutation(len(self.kept), self.seed, epoch)[place])])
        return self.known.row(self.skip + number - before)


def packed_rows(samples: Sequence[Sample], length: int) -> list[list[Sample]]:
    """Samples packed into rows of `length` tokens, longest first so that little is padding."""
    fitting = [sample for sample in samples if len(sample) <= length]
    return pack(sorted(fitting, key=len, reverse=True), length)
