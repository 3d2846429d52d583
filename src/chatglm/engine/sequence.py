"""Sequence: one stream of tokens, from its context to its finish reason."""

from __future__ import annotations

import itertools
import secrets
from dataclasses import dataclass, field
from typing import Literal

import numpy

from ..errors import PromptTooLongError
from .sampling import SamplingParams
from .speculation import DraftRecord

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: the model ended it, or a stop string did; `length`: a token limit did; `cancelled`: the caller did;
`error`: the scores were not finite."""

_numbers = itertools.count()


@dataclass(eq=False)
class Sequence:
    """Context, generated ids and everything that belongs to this stream alone.

    context_ids  the tokens up to `<sop>`, which is not among them; a `[gMASK]` or `[MASK]` is
    start_id     `<sop>`
    mask_place   index in context_ids of the mask that the answer fills
    max_new      token limit of the answer
    """

    context_ids: list[int]
    start_id: int
    mask_place: int
    is_gmask: bool
    max_new: int
    params: SamplingParams
    generated_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    slots: list[int] = field(default_factory=list)
    cached: int = 0
    drafts: DraftRecord = field(default_factory=DraftRecord)
    number: int = field(default_factory=lambda: next(_numbers))
    seed: int = 0

    def __post_init__(self) -> None:
        self.seed = secrets.randbelow(2**63) if self.params.seed is None else self.params.seed

    @classmethod
    def from_prompt_ids(
        cls, ids: list[int], params: SamplingParams, *, max_new: int, sop_id: int, gmask_id: int, mask_id: int
    ) -> Sequence:
        """From ids that end in `<sop>`, as the tokenizer makes them. `[gMASK]` is filled before `[MASK]`.

        Raises PromptTooLongError for a context that is empty of masks or does not end in `<sop>`.
        """
        context = ids[:-1]
        if not ids or ids[-1] != sop_id or not (gmask_id in context or mask_id in context):
            raise PromptTooLongError("a context must hold [gMASK] or [MASK] and end in <sop>")
        is_gmask = gmask_id in context
        place = context.index(gmask_id if is_gmask else mask_id)
        return cls(context, sop_id, place, is_gmask, max_new, params)

    @property
    def num_prompt_tokens(self) -> int:
        """Context and `<sop>`."""
        return len(self.context_ids) + 1

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def uniform(self) -> float:
        """The random number in [0, 1) of the next token: a function of (seed, step) alone, so it survives batching."""
        step = len(self.generated_ids)
        return float(numpy.random.Generator(numpy.random.Philox(key=self.seed, counter=step)).random())

    def append(self, token: int, end_id: int) -> None:
        """Take one token; the end token finishes the sequence and is kept out of `generated_ids`."""
        if token == end_id:
            self.finish_reason = "stop"
            return
        self.generated_ids.append(token)
        if len(self.generated_ids) >= self.max_new:
            self.finish_reason = "length"

    def fail(self, message: str) -> None:
        self.finish_reason, self.error = "error", message

    def cancel(self) -> None:
        """Stop after the tokens that are there."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
