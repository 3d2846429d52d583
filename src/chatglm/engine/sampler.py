"""Sampler: logits and each sequence's own settings → one token a sequence, on the device.

A sequence's choice depends on its logits, settings, seed and step alone, never on its neighbours in the batch. Order,
as in the field: penalties and bans, temperature, top-k, top-p, min-p. A row with a non-finite score is reported, not
sampled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .sequence import Sequence


@dataclass(frozen=True)
class Samples:
    """For each row the chosen token, and whether its scores were all finite."""

    tokens: list[int]
    is_finite: list[bool]


class Sampler:
    """`no_piece`: bool [vocab], rows of the embedding that no piece of the tokenizer belongs to; never chosen."""

    def __init__(self, no_piece: Tensor | None, end_id: int) -> None:
        self.no_piece = no_piece
        self.end_id = end_id

    @staticmethod
    def takes_the_best(sequence: Sequence) -> bool:
        """Whether a sequence's next token is simply the best one that has a piece."""
        params = sequence.params
        is_changed = params.has_penalties or params.no_repeat_ngram_size
        return params.is_greedy and not is_changed and len(sequence.generated_ids) >= params.min_new_tokens

    @torch.inference_mode()
    def __call__(self, logits: Tensor, sequences: list[Sequence]) -> Samples:
        """logits: fp32 [batch, vocab], one row for each sequence."""
        is_finite = torch.isfinite(logits).all(dim=-1)
        logits = torch.where(is_finite[:, None], logits, 0.0)
        logits = self.process(logits, sequences)
        tokens = logits.argmax(dim=-1)
        drawing = [row for row, sequence in enumerate(sequences) if not sequence.params.is_greedy]
        if drawing:
            tokens[drawing] = _draw(logits[drawing], [sequences[row] for row in drawing])
        both = torch.stack((tokens, is_finite.long())).tolist()  # one transfer to the host
        return Samples(both[0], [bool(flag) for flag in both[1]])

    def process(self, logits: Tensor, sequences: list[Sequence]) -> Tensor:
        """Penalties and bans; a new tensor [batch, vocab]."""
        logits = logits.clone() if self.no_piece is None else logits.masked_fill(self.no_piece, -torch.inf)
        for row, sequence in enumerate(sequences):
            params = sequence.params
            if params.has_penalties:
                penalize(logits[row], sequence)
            if params.no_repeat_ngram_size:
                logits[row, banned_by_ngrams(_counted(sequence), params.no_repeat_ngram_size)] = -torch.inf
            if len(sequence.generated_ids) < params.min_new_tokens:
                logits[row, self.end_id] = -torch.inf
        return logits


def _counted(sequence: Sequence) -> list[int]:
    """The tokens that penalties look at: the answer, and the context if asked for."""
    if sequence.params.penalize_context:
        return [*sequence.context_ids, sequence.start_id, *sequence.generated_ids]
    return sequence.generated_ids


def penalize(logits: Tensor, sequence: Sequence) -> None:
    """Repetition, presence and frequency penalties on one row [vocab], in place."""
    params, counts = sequence.params, Counter(_counted(sequence))
    if not counts:
        return
    seen = torch.tensor(list(counts), device=logits.device)
    times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
    scores = logits[seen]
    scores = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    logits[seen] = scores - params.presence_penalty - params.frequency_penalty * times


def banned_by_ngrams(ids: list[int], size: int) -> list[int]:
    """Tokens that would repeat an n-gram of `size` tokens within `ids`."""
    if len(ids) + 1 < size:
        return []
    last = ids[len(ids) - size + 1 :]
    return [ids[i + size - 1] for i in range(len(ids) - size + 1) if ids[i : i + size - 1] == last]


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """One token a row by the inverse of its cumulative distribution, int64 [batch]."""
    device = logits.device
    params = [sequence.params for sequence in sequences]

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=device)[:, None]

    vocab = logits.shape[-1]
    limits = [p.top_k or vocab for p in params]
    kept = min(vocab, max(limits))
    scores, ids = logits.topk(kept, dim=-1)  # sorted, best first; [batch, kept]
    scores = scores / column([p.temperature for p in params])
    scores = scores.masked_fill(torch.arange(kept, device=device) >= column(limits), -torch.inf)
    probabilities = scores.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = (before >= column([p.top_p for p in params])) | (
        probabilities < column([p.min_p for p in params]) * probabilities[:, :1]
    )
    dropped[:, 0] = False  # the best token always stays
    cumulative = probabilities.masked_fill(dropped, 0.0).cumsum(dim=-1)
    threshold = column([sequence.uniform() for sequence in sequences]) * cumulative[:, -1:]
    place = (cumulative <= threshold).sum(dim=-1, keepdim=True).clamp(max=kept - 1)
    chosen: Tensor = ids.gather(-1, place)[:, 0]
    return chosen
