"""ServingSampler: logits and each choice's own settings → one token a row, with log-probabilities where asked.

Order: bias, grammar, repetition (context and answer), presence and frequency (answer), n-grams, temperature, top-k,
top-p, min-p, draw. Log-probabilities are taken after bias and grammar and before everything else. A row's token
depends on that row alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sampler import banned_by_ngrams, penalize
from .stream import Stream, TokenInfo

BAN, FORCE = -100.0, 100.0
"""Biases that mean never and always."""

FORCED_SCORE = 1e6

SORTED_TOKENS = 1_024
"""Best tokens that are sorted at first; rows whose kept set is larger sort everything."""


@dataclass(frozen=True)
class Chosen:
    """The token of one row. `error` says why there is none."""

    token: int
    info: TokenInfo | None = None
    error: str | None = None


class ServingSampler:
    """`no_piece`: bool [vocab], rows of the embedding that no piece belongs to; never chosen."""

    def __init__(self, no_piece: Tensor | None, end_id: int) -> None:
        self.no_piece = no_piece
        self.end_id = end_id

    @torch.inference_mode()
    def __call__(self, logits: Tensor, streams: list[Stream]) -> list[Chosen]:
        """logits: fp32 [batch, vocab], one row for each stream."""
        is_finite = torch.isfinite(logits).all(dim=-1)
        logits = torch.where(is_finite[:, None], logits, 0.0)
        if self.no_piece is not None:
            logits = logits.masked_fill_(self.no_piece, -torch.inf)
        errors = [self._restrict(logits[row], stream) for row, stream in enumerate(streams)]
        asked = [row for row, stream in enumerate(streams) if stream.shared.logprobs is not None]
        logprobs = {row: logits[row].log_softmax(dim=-1) for row in asked}
        for row, stream in enumerate(streams):
            self._penalize(logits[row], stream)
        tokens = logits.argmax(dim=-1)
        drawing = [row for row, stream in enumerate(streams) if not stream.params.is_greedy]
        if drawing:
            tokens[drawing] = draw(logits[drawing], [streams[row] for row in drawing])
        both = torch.stack((tokens, is_finite.long())).tolist()  # one transfer to the host
        return [
            Chosen(0, error="non_finite_logits")
            if not finite
            else Chosen(0, error=error)
            if error
            else Chosen(token, _info(logprobs[row], token, stream) if row in logprobs else None)
            for row, (token, finite, error, stream) in enumerate(zip(*both, errors, streams, strict=True))
        ]

    def _restrict(self, logits: Tensor, stream: Stream) -> str | None:
        """Bias and grammar on one row, in place. Returns what is wrong with the grammar."""
        shared = stream.shared
        for token, bias in shared.logit_bias.items():
            logits[token] += -torch.inf if bias <= BAN else FORCED_SCORE if bias >= FORCE else bias
        if stream.matcher is not None:
            try:
                allowed = torch.from_numpy(stream.matcher.allowed()).to(logits.device)
            except ValueError as error:
                return f"grammar: {error}"
            if not bool(allowed.any()):
                return "grammar: no token can follow"
            logits.masked_fill_(~allowed, -torch.inf)
        if stream.matcher is None and (shared.ignore_eos or len(stream.generated_ids) < stream.params.min_new_tokens):
            logits[self.end_id] = -torch.inf
        return None

    def _penalize(self, logits: Tensor, stream: Stream) -> None:
        params = stream.params
        if stream.shared.penalize_repetition != 1:
            seen = torch.tensor(
                sorted({*stream.context_ids, stream.start_id, *stream.generated_ids}), device=logits.device
            )
            scores, strength = logits[seen], stream.shared.penalize_repetition
            logits[seen] = torch.where(scores > 0, scores / strength, scores * strength)
        if params.has_penalties:
            penalize(logits, stream)
        if params.no_repeat_ngram_size:
            logits[banned_by_ngrams(stream.generated_ids, params.no_repeat_ngram_size)] = -torch.inf


def _info(logprobs: Tensor, token: int, stream: Stream) -> TokenInfo:
    count = stream.shared.logprobs or 0
    best = logprobs.topk(min(count, logprobs.shape[-1])) if count else None
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
    return TokenInfo(token, float(logprobs[token]), tuple((i, v) for i, v in top if v > -torch.inf))


def draw(logits: Tensor, streams: list[Stream]) -> Tensor:
    """One token a row by the inverse of its cumulative distribution over tokens sorted best first, int64 [batch]."""
    vocab = logits.shape[-1]
    temperatures = torch.tensor([[s.params.temperature] for s in streams], device=logits.device)
    kept = min(vocab, SORTED_TOKENS)
    scaled = logits / temperatures
    probabilities, ids = scaled.softmax(dim=-1).topk(kept, dim=-1)
    mass = probabilities.sum(dim=-1).tolist()
    chosen: list[Tensor] = []
    for row, stream in enumerate(streams):
        params = stream.params
        is_enough = kept == vocab or 0 < params.top_k <= kept or mass[row] >= params.top_p
        if is_enough:
            sorted_row, sorted_ids = probabilities[row], ids[row]
        else:
            sorted_row, sorted_ids = scaled[row].softmax(dim=-1).sort(descending=True)
        chosen.append(sorted_ids[_place(sorted_row, stream)])
    return torch.stack(chosen)


def _place(probabilities: Tensor, stream: Stream) -> Tensor:
    """The place that the stream's random number falls on, among probabilities sorted best first, int64 []."""
    params = stream.params
    if params.top_k:
        probabilities = probabilities[: params.top_k] / probabilities[: params.top_k].sum()
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = (before >= params.top_p) | (probabilities < params.min_p * probabilities[0])
    dropped[0] = False  # the best token always stays
    cumulative = probabilities.masked_fill(dropped, 0.0).cumsum(dim=-1)
    threshold = stream.uniform() * cumulative[-1]
    return (cumulative <= threshold).sum().clamp(max=len(probabilities) - 1)
