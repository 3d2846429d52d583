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

    def __call__(self, logits: Tensor, streams: list[Stream]) -> list[Chosen]:
        """logits: fp32 [batch, vocab], one row for each stream."""
        return self.start(logits, streams).wait()

    @torch.inference_mode()
    def start(self, logits: Tensor, streams: list[Stream]) -> Draws:
        """The same without waiting for the device; streams must stay as they are until `wait`."""
        is_finite = torch.isfinite(logits).all(dim=-1)
        logits = torch.where(is_finite[:, None], logits, 0.0)
        if self.no_piece is not None:
            logits = logits.masked_fill_(self.no_piece, -torch.inf)
        errors = [_restrict(logits[row], stream) for row, stream in enumerate(streams)]
        going_on = [row for row, stream in enumerate(streams) if _may_not_end(stream)]
        if going_on:
            logits[going_on, self.end_id] = -torch.inf
        asked = [row for row, stream in enumerate(streams) if stream.shared.logprobs is not None]
        logprobs = {row: logits[row].log_softmax(dim=-1) for row in asked}
        for row, stream in enumerate(streams):
            _penalize(logits[row], stream)
        tokens = logits.argmax(dim=-1)
        drawing = [row for row, stream in enumerate(streams) if not stream.params.is_greedy]
        if len(drawing) == len(streams):
            tokens = draw(logits, streams)
        elif drawing:
            tokens[drawing] = draw(logits[drawing], [streams[row] for row in drawing])
        return Draws(list(streams), torch.stack((tokens, is_finite.long())), errors, logprobs)


class Draws:
    """Tokens that are being drawn, one for each stream."""

    def __init__(
        self, streams: list[Stream], both: Tensor, errors: list[str | None], logprobs: dict[int, Tensor]
    ) -> None:
        """both: int64 [2, batch]: tokens, and whether the row's scores were finite."""
        self.streams, self._errors, self._logprobs = streams, errors, logprobs
        self._event: torch.cuda.Event | None = None
        self._both = both
        if both.is_cuda:
            self._both = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._both.copy_(both, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[Chosen]:
        """What was drawn, once the device has come so far."""
        if self._event is not None:
            self._event.synchronize()
        rows = zip(*self._both.tolist(), self._errors, self.streams, strict=True)
        return [
            Chosen(0, error="non_finite_logits")
            if not finite
            else Chosen(0, error=error)
            if error
            else Chosen(token, _info(self._logprobs[row], token, stream) if row in self._logprobs else None)
            for row, (token, finite, error, stream) in enumerate(rows)
        ]


def _may_not_end(stream: Stream) -> bool:
    is_early = stream.shared.ignore_eos or len(stream.generated_ids) < stream.params.min_new_tokens
    return stream.matcher is None and is_early


def _restrict(logits: Tensor, stream: Stream) -> str | None:
    """Bias and grammar on one row, in place. Returns what is wrong with the grammar."""
    for token, bias in stream.shared.logit_bias.items():
        logits[token] += -torch.inf if bias <= BAN else FORCED_SCORE if bias >= FORCE else bias
    if stream.matcher is None:
        return None
    try:
        allowed = torch.from_numpy(stream.matcher.allowed()).to(logits.device)
    except ValueError as error:
        return f"grammar: {error}"
    if not bool(allowed.any()):
        return "grammar: no token can follow"
    logits.masked_fill_(~allowed, -torch.inf)
    return None


def _penalize(logits: Tensor, stream: Stream) -> None:
    params = stream.params
    if stream.shared.penalize_repetition != 1:
        seen = torch.tensor(sorted({*stream.context_ids, stream.start_id, *stream.generated_ids}), device=logits.device)
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
    """One token a row by the inverse of its cumulative distribution over tokens sorted best first, int64 [batch].

    All rows at once, in a fixed number of operations: on a GPU each costs more than its arithmetic.
    """
    vocab = logits.shape[-1]
    wishes = torch.tensor([_wishes(stream, vocab) for stream in streams], dtype=torch.float32).T[:, :, None]
    temperature, top_k, top_p, min_p, uniform = wishes.to(logits.device)  # each [batch, 1]
    kept = min(vocab, SORTED_TOKENS)
    scaled = logits / temperature
    probabilities, ids = scaled.softmax(dim=-1).topk(kept, dim=-1)
    tokens: Tensor = ids.gather(1, _places(probabilities, top_k, top_p, min_p, uniform))[:, 0]
    open_rows = [row for row, stream in enumerate(streams) if not 0 < stream.params.top_k <= kept]
    if open_rows and kept < vocab:
        mass = probabilities[open_rows].sum(dim=-1).tolist()
        for row, sum_of_kept in zip(open_rows, mass, strict=True):
            if sum_of_kept < streams[row].params.top_p:
                one = slice(row, row + 1)
                everything, all_ids = scaled[one].softmax(dim=-1).sort(dim=-1, descending=True)
                place = _places(everything, top_k[one], top_p[one], min_p[one], uniform[one])
                tokens[row] = all_ids[0, place[0, 0]]
    return tokens


def _wishes(stream: Stream, vocab: int) -> tuple[float, ...]:
    params = stream.params
    return params.temperature, params.top_k or vocab, params.top_p, params.min_p, stream.uniform()


def _places(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """The places that random numbers fall on, int64 [batch, 1], among probabilities [batch, kept] sorted best first."""
    kept = probabilities.shape[-1]
    is_beyond = torch.arange(kept, device=probabilities.device) >= top_k
    probabilities = probabilities.masked_fill(is_beyond, 0.0)
    probabilities = torch.where(top_k <= kept, probabilities / probabilities.sum(dim=-1, keepdim=True), probabilities)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = (before >= top_p) | (probabilities < min_p * probabilities[:, :1])
    dropped[:, 0] = False  # the best token always stays
    cumulative = probabilities.masked_fill(dropped, 0.0).cumsum(dim=-1)
    places: Tensor = (cumulative <= uniform * cumulative[:, -1:]).sum(dim=-1, keepdim=True).clamp(max=kept - 1)
    return places
