"""Objective: the ids of a row of text → its samples, all randomness from (seed, epoch, index)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..samples import IntArray, Sample
from .blank_filling import fill_spans
from .continuation import Encoding, continue_text
from .mixture import CHATGLM, Mixture
from .spans import Span, sentence_spans, spans_within_documents, token_spans
from .special_ids import SpecialIds

TEXT_SHARE = 0.88
"""Tokens of text for a window in which spans are cut out: n tokens grow to n + 2 · spans, 1.1 n on average. With 450
tokens for 512 one sample in 20,000 is cut; GLM-130B's 500 lose 36% of the targets (spec/training.md §1.7)."""

REDRAWS = 4


def generator(seed: int, epoch: int, index: int, purpose: int = 0) -> np.random.Generator:
    """The random numbers of one row: the same whoever asks, in any order, on any machine."""
    return np.random.default_rng((seed, epoch, index, purpose))


def text_tokens(window: int) -> int:
    """Tokens of text that are masked together for a window: 450 for 512."""
    return max(1, int(TEXT_SHARE * window))


@dataclass(frozen=True)
class Objective:
    """What a row of text becomes.

    ids            the model's special ids
    mixture        how often which objective is drawn
    encoding       "2d" or "1d" positions
    ends_sentence  [vocab]: whether an id closes a sentence; needed where `mixture.sentence` is not 0
    """

    ids: SpecialIds
    mixture: Mixture = CHATGLM
    encoding: Encoding = "2d"
    ends_sentence: npt.NDArray[np.bool_] | None = None

    def draw_mode(self, random: np.random.Generator) -> str:
        """token, sentence or document."""
        draw = random.random()
        if draw < self.mixture.token:
            return "token"
        return "sentence" if draw < self.mixture.token + self.mixture.sentence else "document"

    def text_length(self, mode: str, window: int) -> int:
        """Tokens of text that a row of `window` tokens takes in this mode."""
        if mode == "document":
            return window - self.document_overhead
        first = int(self.mixture.within_documents)
        parts = self.parts(mode, window)
        return parts * max(1, text_tokens(window // parts) - first)

    @property
    def document_overhead(self) -> int:
        """Tokens that a document sample has more than its text: `[gMASK]` (sop takes the last token's place), an eop
        where a span is cut out of the middle, `[CLS]`.
        """
        return 1 + int(self.mixture.gpt_infill_prob > 0) + int(self.mixture.within_documents)

    def parts(self, mode: str, window: int) -> int:
        """Texts that a row of this mode is cut in."""
        return 1 if mode == "document" else min(self.mixture.parts, window)

    def samples(self, text: IntArray, mode: str, window: int, random: np.random.Generator) -> list[Sample]:
        """The samples of one row, together at most `window` tokens.

        text  [text_length(mode, window)] ids, or fewer at the end of a corpus
        """
        parts = self.parts(mode, window)
        step = self.text_length(mode, window) // parts
        pieces = [text[start : start + step] for start in range(0, len(text), step)]
        return [self.sample(piece, mode, random, limit=window // parts) for piece in pieces if len(piece)]

    def sample(self, text: IntArray, mode: str, random: np.random.Generator, *, limit: int | None = None) -> Sample:
        """One sample of one text. A text too short for its spans is continued instead (objective "document")."""
        mixture = self.mixture
        if mixture.short_seq_prob and random.random() < mixture.short_seq_prob:
            text = text[: int(random.integers(min(2, len(text)), len(text), endpoint=True))]
        spans: list[Span] | None = None
        mask = self.ids.mask
        if mode == "token":
            spans = self._fitting_token_spans(text, random, limit)
        elif mode == "sentence":
            mask = self.ids.smask
            spans = sentence_spans(self._closes(text), random)
        elif mixture.gpt_infill_prob and self._is_one_document(text) and random.random() < mixture.gpt_infill_prob:
            mask = self.ids.gmask
            length = self._generated_length(len(text), random)
            start = int(random.integers(0, len(text) - length, endpoint=True))
            spans = [Span(start, start + length)]
        return self._begin(self._filled(text, spans, mask, mode, random, limit), limit)

    def _filled(
        self,
        text: IntArray,
        spans: list[Span] | None,
        mask: int,
        mode: str,
        random: np.random.Generator,
        limit: int | None,
    ) -> Sample:
        limit = None if limit is None else limit - int(self.mixture.within_documents)
        if not spans:
            length = self._generated_length(len(text), random)
            return continue_text(text, length, self.ids, encoding=self.encoding, limit=limit)
        order = random.permutation(len(spans)).tolist()
        hide = random if self.mixture.hide_tokens else None
        return fill_spans(text, spans, order, self.ids, mask=mask, objective=mode, limit=limit, hide=hide)

    def _generated_length(self, tokens: int, random: np.random.Generator) -> int:
        """Uniform from int(r_min · n) to n; GLM keeps two tokens of context."""
        most = max(1, tokens - 2) if self.mixture.within_documents else tokens
        least = min(most, max(1, int(self.mixture.r_min * tokens)))
        return int(random.integers(least, most, endpoint=True))

    def _fitting_token_spans(self, text: IntArray, random: np.random.Generator, limit: int | None) -> list[Span] | None:
        """Spans drawn anew, a few times, where the sample would not fit: one in 20,000 at the default text length."""
        single = bool(self.mixture.single_span_prob) and bool(random.random() < self.mixture.single_span_prob)
        spans = self._token_spans(text, random, single)
        for _ in range(REDRAWS if limit else 0):
            if len(text) + 2 * len(spans or ()) + int(self.mixture.within_documents) <= (limit or 0):
                break
            spans = self._token_spans(text, random, single)
        return spans

    def _token_spans(self, text: IntArray, random: np.random.Generator, single: bool) -> list[Span] | None:
        if not self.mixture.within_documents:
            return token_spans(len(text), random, single=single)
        return spans_within_documents(self._documents(text), random, single=single)

    def _documents(self, text: IntArray) -> list[Span]:
        ends = np.flatnonzero(text == self.ids.end_of_text).tolist()
        starts = [0, *(end + 1 for end in ends)]
        return [Span(start, stop) for start, stop in zip(starts, [*ends, len(text)], strict=True) if stop > start]

    def _is_one_document(self, text: IntArray) -> bool:
        return not bool((text[:-1] == self.ids.end_of_text).any())

    def _closes(self, text: IntArray) -> npt.NDArray[np.bool_]:
        assert self.ends_sentence is not None, "a mixture with a sentence share needs `ends_sentence`"
        return self.ends_sentence[text]

    def _begin(self, sample: Sample, limit: int | None) -> Sample:
        """GLM's rows begin with `[CLS]`, which belongs to the context and is never cut out."""
        if not self.mixture.within_documents:
            return sample
        ones = np.array([[1], [0]], dtype=np.int32)
        return replace(
            sample,
            ids=np.concatenate([[self.ids.start_of_text], sample.ids]).astype(np.int32),
            targets=np.concatenate([[-100], sample.targets]).astype(np.int32),
            positions=np.concatenate([np.zeros((2, 1), dtype=np.int32), sample.positions + ones], axis=1),
            context_length=sample.context_length + 1,
        )
