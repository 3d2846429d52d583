"""How long a quantised model says the same as the reference: greedy answers compared token by token.

The reference answers some questions greedily. The other model is then led along that answer: the first place where its
best token is another one is the place where its own greedy answer would have left it. One pass, no second generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..engine.kv_cache import KVCache
from ..engine.runner import Runner
from ..engine.sampler import Sampler
from ..engine.sampling import SamplingParams
from ..engine.scheduler import Engine
from ..engine.sequence import Sequence as Stream
from ..model import GLM
from ..tokenizer.examples import Example
from .scoring import Score

LONGEST_ANSWER = 64
"""Tokens of a greedy answer that are compared."""


@dataclass(frozen=True)
class Divergence:
    """Where answers leave the reference's.

    equal_answers     share of answers that are the same to their end (or to LONGEST_ANSWER)
    equal_tokens      share of the reference's answer tokens before the first difference
    first_difference  median over all answers of the number of equal tokens in front
    """

    equal_answers: float
    equal_tokens: float
    first_difference: float


def greedy_answers(model: GLM, examples: Sequence[Example], longest: int = LONGEST_ANSWER) -> list[Example]:
    """The contexts of `examples`, each once, with the greedy answer of `model` (its `<eop>` included)."""
    config = model.config
    contexts = list(dict.fromkeys(example.context_ids for example in examples))
    streams = [
        Stream.from_prompt_ids(
            [*context, config.bos_token_id],
            SamplingParams(temperature=0),
            max_new=min(longest, config.max_sequence_length - len(context) - 1),
            sop_id=config.bos_token_id,
            gmask_id=config.gmask_token_id,
            mask_id=config.mask_token_id,
        )
        for context in contexts
        if len(context) + 1 < config.max_sequence_length
    ]
    runner = Runner(model, KVCache(config, 8 * config.max_sequence_length, model.dtype, model.device))
    engine = Engine(runner, Sampler(None, config.eos_token_id))
    for stream in streams:
        engine.add(stream)
    while engine.has_work:
        engine.step()
    answers = []
    for stream in streams:
        ended = (config.eos_token_id,) if stream.finish_reason == "stop" else ()
        generated = tuple(token for token in stream.generated_ids if token != config.eos_token_id)
        answers.append(Example(tuple(stream.context_ids), generated + ended, 0))
    return [answer for answer in answers if answer.answer_ids]


def divergence(found: Score, answers: Sequence[Example]) -> Divergence:
    """What a model's score of the reference's greedy answers says about its own."""
    lengths = [len(answer.answer_ids) for answer in answers]
    reference = torch.tensor([token for answer in answers for token in answer.answer_ids])
    equal = (found.best == reference).split(lengths)
    before = [int(same.long().cumprod(0).sum()) for same in equal]
    complete = [count == length for count, length in zip(before, lengths, strict=True)]
    middle = sorted(before)[len(before) // 2]
    return Divergence(sum(complete) / len(answers), sum(before) / sum(lengths), float(middle))
