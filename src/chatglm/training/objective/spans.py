"""Which parts of a text are cut out: random spans (`[MASK]`), whole sentences (`[sMASK]`).

Span lengths follow Poisson(3) without 0; 15% of the tokens are cut; spans never touch. Source: GLM (ACL 2022) §2.3;
spec/training.md §1.3 and §1.4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MASKED_SHARE = 0.15
MEAN_SPAN = 3
LONGEST_SPAN = 39

Integers = npt.NDArray[np.int64]


class Span(NamedTuple):
    """Tokens `start … stop - 1` of a text."""

    start: int
    stop: int


def span_length_weights() -> npt.NDArray[np.float64]:
    """Probability of the lengths 1 … 39: Poisson(3), renormalised without 0 and the lengths beyond."""
    weights = [MEAN_SPAN**length / math.factorial(length) for length in range(1, LONGEST_SPAN + 1)]
    return np.array([weight / sum(weights) for weight in weights])


_CUMULATED = np.cumsum(span_length_weights())
_CUMULATED[-1] = 1.0


def draw_lengths(tokens: int, random: np.random.Generator, *, single: bool = False) -> Integers:
    """Lengths of the spans of a text: drawn until 15% of it is reached (the last may overshoot), or exactly one."""
    wanted = max(1, int(MASKED_SHARE * tokens))
    lengths = np.searchsorted(_CUMULATED, random.random(1 if single else wanted), side="right") + 1
    count = 1 if single else int(np.searchsorted(np.cumsum(lengths), wanted)) + 1
    return lengths[:count].astype(np.int64)


def place_spans(lengths: Integers, tokens: int, random: np.random.Generator) -> list[Span] | None:
    """Spans of these lengths, shuffled, at uniform places of a text, at least one token apart. None: no room."""
    room = tokens - int(lengths.sum()) - len(lengths) + 1
    if room < 0:
        return None
    lengths = random.permutation(lengths)
    places = np.sort(random.integers(0, room, size=len(lengths), endpoint=True))
    starts = places + np.cumsum(lengths) - lengths + np.arange(len(lengths))
    return [Span(int(start), int(start + length)) for start, length in zip(starts, lengths, strict=True)]


def token_spans(tokens: int, random: np.random.Generator, *, single: bool = False) -> list[Span] | None:
    """Random spans of a text, in the order of the text. None: they do not fit."""
    return place_spans(draw_lengths(tokens, random, single=single), tokens, random)


def spans_within_documents(
    documents: Sequence[Span], random: np.random.Generator, *, single: bool = False
) -> list[Span] | None:
    """Random spans that stay inside the documents of a row (GLM's own rule). None: they do not fit.

    The shorter documents get 15% of their own tokens each, the longest gets what is left of the lengths drawn.
    """
    by_length = sorted(documents, key=lambda document: document.stop - document.start)
    lengths = draw_lengths(sum(stop - start for start, stop in by_length), random, single=single)
    spans: list[Span] = []
    given = 0
    for document in by_length:
        tokens = document.stop - document.start
        is_longest = document is by_length[-1]
        cumulated = np.cumsum(lengths[given:])
        wanted = int(MASKED_SHARE * tokens)
        count = len(cumulated) if is_longest else int(np.searchsorted(cumulated, wanted)) + 1 if wanted else 0
        part = lengths[given : given + count]
        given += len(part)
        if len(part) == 0:
            continue
        placed = place_spans(part, tokens, random)
        if placed is None:
            return None
        spans += (Span(start + document.start, stop + document.start) for start, stop in placed)
    return sorted(spans)


def sentence_spans(ends_sentence: npt.NDArray[np.bool_], random: np.random.Generator) -> list[Span]:
    """Whole sentences until 15% of the tokens are cut, in the order of the text.

    ends_sentence  [tokens]: whether a token closes a sentence
    """
    tokens = len(ends_sentence)
    borders = [0, *(np.flatnonzero(ends_sentence) + 1).tolist()]
    if borders[-1] != tokens:
        borders.append(tokens)
    sentences = [Span(start, stop) for start, stop in itertools.pairwise(borders)]
    chosen: list[Span] = []
    cut = 0
    for index in random.permutation(len(sentences)):
        if chosen and cut >= MASKED_SHARE * tokens:
            break
        chosen.append(sentences[index])
        cut += sentences[index].stop - sentences[index].start
    return sorted(chosen)
