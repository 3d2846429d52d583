"""Beam search over one context. All beams share the context's cache slots, and reordering moves slot tables, not keys.

Scores are summed log-probabilities; a complete answer's score is divided by (its whole length, context included) to
the power `length_penalty`, as the released code did (transformers 4.27).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import torch

from .runner import Runner
from .sampler import Sampler
from .scheduler import NOT_FINITE
from .sequence import FinishReason, Sequence


@dataclass(order=True)
class Answer:
    """A complete answer and its score divided by length."""

    score: float
    ids: list[int] = field(compare=False)
    finish_reason: FinishReason = field(compare=False)


@dataclass
class Beam:
    """An unfinished answer: its summed log-probability and the cache slots that it reads."""

    score: float
    ids: list[int]
    table: list[int]


def beam_search(runner: Runner, sampler: Sampler, sequence: Sequence) -> list[Answer]:
    """The `num_beams` best answers, best first; the best one's ids and finish reason are also written into `sequence`.

    Scores that are not finite fail the sequence and give no answers. Raises DeviceError when the cache cannot hold the
    context and all beams.
    """
    width = sequence.params.num_beams
    context = runner.prefix_length + sequence.num_prompt_tokens
    sequence.slots = runner.cache.allocate(context + width * (sequence.max_new - 1))
    complete: list[Answer] = []
    try:
        spare = iter(sequence.slots[context:])
        beams = [Beam(0.0, [], sequence.slots[:context])]
        logits = runner.prefill([sequence])
        for step in range(1, sequence.max_new + 1):
            if not bool(torch.isfinite(logits).all()):
                sequence.fail(NOT_FINITE)
                return []
            beams, best_score = _extend(logits, beams, complete, sequence, sampler)
            if _is_done(complete, best_score, sequence.num_prompt_tokens + step - 1, sequence):
                break
            if step == sequence.max_new:  # at the token limit the unfinished beams compete too
                for beam in beams:
                    _keep(complete, beam, "length", sequence)
                break
            for beam in beams:
                beam.table = [*beam.table, next(spare)]
            tokens = torch.tensor([beam.ids[-1] for beam in beams], device=logits.device)
            logits = runner.step(tokens, [beam.table for beam in beams], [sequence] * len(beams))
    finally:
        runner.cache.release(sequence.slots)
        sequence.slots = []
    best = sorted(complete, reverse=True)
    sequence.generated_ids, sequence.finish_reason = best[0].ids, best[0].finish_reason
    return best


def _extend(
    logits: torch.Tensor, beams: list[Beam], complete: list[Answer], sequence: Sequence, sampler: Sampler
) -> tuple[list[Beam], float]:
    """The best `num_beams` continuations, and the best score among all candidates; ended ones go to `complete`."""
    width = sequence.params.num_beams
    scores = sampler.process(logits.log_softmax(dim=-1), [_row(sequence, beam.ids) for beam in beams])
    scores = scores + torch.tensor([beam.score for beam in beams], device=scores.device)[:, None]
    vocab = scores.shape[-1]
    best = scores.flatten().topk(min(2 * width, scores.numel()))
    candidates = list(zip(best.values.tolist(), best.indices.tolist(), strict=True))
    extended: list[Beam] = []
    for rank, (score, flat) in enumerate(candidates):
        parent, token = beams[flat // vocab], flat % vocab
        if token != sampler.end_id:
            extended.append(Beam(score, [*parent.ids, token], parent.table))
        elif rank < width:  # an end that is not among the best `num_beams` is dropped, as the released code did
            _keep(complete, Beam(score, parent.ids, []), "stop", sequence)
        if len(extended) == width:
            break
    return extended, candidates[0][0]


def _row(sequence: Sequence, ids: list[int]) -> Sequence:
    """A stand-in for one beam, so that penalties see its tokens."""
    return Sequence(
        sequence.context_ids,
        sequence.start_id,
        sequence.mask_place,
        sequence.is_gmask,
        sequence.max_new,
        sequence.params,
        ids,
    )


def _keep(complete: list[Answer], beam: Beam, reason: FinishReason, sequence: Sequence) -> None:
    """Keep the `num_beams` best complete answers (a heap, worst first)."""
    params = sequence.params
    length = sequence.num_prompt_tokens + len(beam.ids)
    answer = Answer(beam.score / length**params.length_penalty, beam.ids, reason)
    if len(complete) < params.num_beams:
        heapq.heappush(complete, answer)
    else:
        heapq.heappushpop(complete, answer)


def _is_done(complete: list[Answer], best_score: float, length: int, sequence: Sequence) -> bool:
    """Whether no running beam can still beat the worst complete answer."""
    params = sequence.params
    if len(complete) < params.num_beams:
        return False
    return params.early_stopping or complete[0].score >= best_score / length**params.length_penalty
