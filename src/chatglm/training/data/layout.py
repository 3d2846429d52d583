"""Records → ids: a text with its end, a dialogue as one sample for each answer.

Kept ids of an answer's sample are `context … [gMASK] | answer … eop`: `sop`, which stands between them, takes the last
token's place when the sample is made, so both have the same length. Source: spec/training.md §1.7, §3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chatglm.errors import TrainingError
from chatglm.tokenizer import Tokenizer, template

from .formats import BadRecordError, Dialogue

SENTENCE_ENDS = ".?!;:。？！；：…\n"
"""A token that holds one of these closes a sentence (GLM's sentence objective)."""


@dataclass(frozen=True)
class Layout:
    """How dialogues are laid out; part of a prepared set's identity.

    length             tokens a sample may have: the oldest rounds are left out whole until it fits
    every_answer       a sample for each answer of a dialogue, not for the last alone
    official           the original script's: contexts cut from the right at `max_source_length` - 1 tokens, answers at
                       `max_target_length` - 2, numbered rounds as soon as there is a history column, and a target at
                       `[gMASK]` (it predicts sop)
    """

    length: int = 2048
    every_answer: bool = True
    official: bool = False
    max_source_length: int = 64
    max_target_length: int = 64

    def __post_init__(self) -> None:
        if self.length < 8:
            raise TrainingError(f"a sample of {self.length} tokens holds no dialogue", cure="use a length of 8 or more")
        if self.official and (self.max_source_length < 2 or self.max_target_length < 3):
            raise TrainingError(
                f"lengths of {self.max_source_length} (source) and {self.max_target_length} (target) leave no room",
                cure="the official script's are 64 and 64",
            )

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Layout:
        return cls(**found)


@dataclass(frozen=True)
class AnswerIds:
    """One sample: `ids` end in eop, `context_length` counts `[gMASK]`."""

    ids: list[int]
    context_length: int
    dropped_rounds: int = 0


def sentence_ends(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """[vocab_size]: whether an id's text holds a mark that closes a sentence."""
    texts = (tokenizer.piece_text(token) for token in range(tokenizer.vocab_size))
    return np.array([isinstance(text, str) and any(mark in text for mark in SENTENCE_ENDS) for text in texts])


def answer_samples(tokenizer: Tokenizer, dialogue: Dialogue, layout: Layout) -> Iterator[AnswerIds]:
    """The samples of a dialogue, in the order of its answers.

    Raises BadRecordError("long") where a question and its answer alone are longer than the layout allows.
    """
    rounds = dialogue.rounds
    if layout.official:
        yield _official(tokenizer, dialogue, layout)
        return
    for number in range(len(rounds)) if layout.every_answer else [len(rounds) - 1]:
        question, answer = rounds[number]
        answer_ids = tokenizer.encode(answer)
        for dropped in range(number + 1):
            prompt = template.render(question, rounds[dropped:number], dialogue.system)
            context = tokenizer.encode_context(prompt)[:-1]
            if len(context) + len(answer_ids) + 1 <= layout.length:
                yield AnswerIds([*context, *answer_ids, tokenizer.eop_id], len(context), dropped)
                break
        else:
            raise BadRecordError(
                "long",
                f"round {number + 1} has {len(context):,} tokens of question and {len(answer_ids) + 1:,} of answer, "
                f"a sample holds {layout.length:,}",
            )


def _official(tokenizer: Tokenizer, dialogue: Dialogue, layout: Layout) -> AnswerIds:
    *history, (question, answer) = dialogue.rounds
    prompt = template.render(question, history)
    if dialogue.has_history and not history:
        prompt = f"[Round 0]\n问：{question}\n答："
    context = tokenizer.encode(prompt)[: layout.max_source_length - 1]
    answer_ids = tokenizer.encode(answer)[: layout.max_target_length - 2]
    return AnswerIds([*context, tokenizer.gmask_id, *answer_ids, tokenizer.eop_id], len(context) + 1)
