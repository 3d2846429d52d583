"""Beam search with the original's scores.

Later releases of transformers divide a finished answer's score by the length of the answer alone; the release that
the original needs (4.27) divided by the whole length, context included, and so chose other answers. This is that
search, for every version, on the same parts: `prepare_inputs_for_generation`, processors and stopping criteria.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateBeamDecoderOnlyOutput

NEVER = -1e9
"""Score of the beams that are copies of the first at the start."""


@dataclass
class Finished:
    """The best complete answers of one context: (score divided by length, ids), at most `width`."""

    width: int
    length_penalty: float
    early_stopping: bool | str
    max_length: int
    answers: list[tuple[float, Tensor]] = field(default_factory=list)

    def add(self, ids: Tensor, score: float) -> None:
        self.answers.append((score / len(ids) ** self.length_penalty, ids))
        self.answers.sort(key=lambda answer: answer[0], reverse=True)
        del self.answers[self.width :]

    def is_done(self, best_score: float, length: int) -> bool:
        """Whether no running beam can still beat the worst answer; best_score: the highest sum among the candidates."""
        if len(self.answers) < self.width:
            return False
        if self.early_stopping is True:
            return True
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_length
        attainable: float = best_score / length**self.length_penalty
        return self.answers[-1][0] >= attainable


@torch.no_grad()
def beam_search(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    stopping_criteria: Any,
    settings: Any,
    model_kwargs: dict[str, Any],
) -> Any:
    """The ids of the best answers, [batch * num_return_sequences, tokens], best first; with scores if asked.

    input_ids  int64 [batch * num_beams, tokens], every context `num_beams` times
    settings   a GenerationConfig
    """
    width = settings.num_beams
    batch = len(input_ids) // width
    ends = _as_list(settings.eos_token_id)
    finished = [
        Finished(width, settings.length_penalty, settings.early_stopping, settings.max_length) for _ in range(batch)
    ]
    done = [False] * batch
    totals = torch.zeros(batch, width, device=input_ids.device)
    if not settings.do_sample:
        totals[:, 1:] = NEVER
    while True:
        inputs = model.prepare_inputs_for_generation(input_ids, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        scores = processors(input_ids, outputs.logits[:, -1].float().log_softmax(dim=-1))  # [batch * width, vocab]
        candidates = _candidates(scores, totals.flatten(), batch, width, settings.do_sample, len(ends))
        parents, tokens, totals = _extend(candidates, finished, done, input_ids, width, ends, _pad_id(settings, ends))
        input_ids = torch.cat((input_ids[parents], tokens[:, None]), dim=1)
        if outputs.cache is not None:
            model_kwargs = _reordered(model, model_kwargs, outputs.cache, parents)
        if all(done) or _says_stop(stopping_criteria, input_ids, scores):
            break
    for row in range(batch):
        if not done[row]:
            for beam in range(width):
                finished[row].add(input_ids[row * width + beam], totals[row, beam].item())
    return _result(finished, settings, ends, input_ids)


def _candidates(
    scores: Tensor, totals: Tensor, batch: int, width: int, do_sample: bool, ends: int
) -> list[list[tuple[float, int, int]]]:
    """For each context its best continuations (summed score, beam, token), best first, so many that `width` go on."""
    vocab = scores.shape[-1]
    sums = (scores + totals[:, None]).view(batch, width * vocab)
    count = min(max(2, 1 + ends) * width, sums.shape[1])
    if do_sample:
        drawn = torch.multinomial(sums.softmax(dim=-1), count)
        values, order = sums.gather(1, drawn).sort(dim=1, descending=True)
        places = drawn.gather(1, order)
    else:
        values, places = sums.topk(count, dim=1)
    return [
        [(value, place // vocab, place % vocab) for value, place in zip(row_values, row_places, strict=True)]
        for row_values, row_places in zip(values.tolist(), places.tolist(), strict=True)
    ]


def _extend(
    candidates: list[list[tuple[float, int, int]]],
    finished: list[Finished],
    done: list[bool],
    input_ids: Tensor,
    width: int,
    ends: list[int],
    pad_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to go on from [batch * width], their new tokens, their sums [batch, width]. Ends go to `finished`."""
    parents: list[int] = []
    tokens: list[int] = []
    totals: list[list[float]] = []
    for row, ranked in enumerate(candidates):
        beams: list[tuple[float, int, int]] = []
        if done[row]:
            beams = [(0.0, 0, pad_id)] * width
        for rank, (score, beam, token) in enumerate(ranked if not beams else ()):
            if token not in ends:
                beams.append((score, beam, token))
            elif rank < width:  # an end that is not among the best `width` is dropped
                finished[row].add(input_ids[row * width + beam], score)
            if len(beams) == width:
                break
        parents += [row * width + beam for _, beam, _ in beams]
        tokens += [token for _, _, token in beams]
        totals.append([score for score, _, _ in beams])
        done[row] = done[row] or finished[row].is_done(ranked[0][0], input_ids.shape[1])
    device = input_ids.device
    return (
        torch.tensor(parents, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(totals, device=device),
    )


def _reordered(model: Any, model_kwargs: dict[str, Any], cache: Any, parents: Tensor) -> dict[str, Any]:
    moved = model._reorder_cache(cache, parents)
    return {key: moved if value is cache else value for key, value in model_kwargs.items()}


def _says_stop(criteria: Any, input_ids: Tensor, scores: Tensor) -> bool:
    stop = criteria(input_ids, scores)  # a bool for each row, or in older versions one
    return bool(stop.all()) if isinstance(stop, Tensor) else bool(stop)


def _result(finished: list[Finished], settings: Any, ends: list[int], input_ids: Tensor) -> Any:
    """The answers as a padded matrix; each that has room gets its end."""
    wanted = settings.num_return_sequences or 1
    best = [answer for row in finished for answer in row.answers[:wanted]]
    longest = min(max(len(ids) for _, ids in best) + 1, settings.max_length)
    pad_id = _pad_id(settings, ends)
    sequences = input_ids.new_full((len(best), longest), pad_id)
    for row, (_, ids) in enumerate(best):
        sequences[row, : len(ids)] = ids
        if len(ids) < longest and ends:
            sequences[row, len(ids)] = ends[0]
    if not settings.return_dict_in_generate:
        return sequences
    scores = torch.tensor([score for score, _ in best], device=input_ids.device)
    return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores)


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    return [int(index) for index in ids] if isinstance(ids, (list, tuple, Tensor)) else [int(ids)]


def _pad_id(settings: Any, ends: list[int]) -> int:
    if settings.pad_token_id is not None:
        return int(settings.pad_token_id)
    return ends[0] if ends else 0
