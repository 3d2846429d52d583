"""Contexts with their answers as training samples, and which answer of a batch each position belongs to.

Actions are the tokens after `<sop>`, `<eop>` among them: position i of the input chooses `targets[i]`. The context is
never an action (spec/training.md §4.5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...config import ModelConfig
from ...errors import TrainingError
from ...model.positions import Layout, generation_positions
from ..samples import IGNORE, PADDING, Batch, Sample, collate


def answer_sample(
    context: Sequence[int], answer: Sequence[int], config: ModelConfig, *, is_finished: bool = True, source: str = ""
) -> Sample:
    """`context | <sop> answer` with the answer's tokens as targets, and `<eop>` behind them where it is finished.

    context  ids that end in `[gMASK]`
    answer   ids without `<eop>`
    Positions are those of generation, so the network sees here what the engine saw. Raises TrainingError for an
    answer without a target, or a context without its `[gMASK]`.
    """
    targets = [*answer, *([config.eos_token_id] if is_finished else [])]
    if not targets:
        raise TrainingError("an answer without tokens that did not end either has nothing to train")
    return _sample(context, [config.bos_token_id, *targets[:-1]], targets, config, source)


def closed_sample(context: Sequence[int], answer: Sequence[int], config: ModelConfig, *, source: str = "") -> Sample:
    """`context | <sop> answer <eop>` without targets: what a reward model reads, `<eop>` being the last token."""
    inputs = [config.bos_token_id, *answer, config.eos_token_id]
    return _sample(context, inputs, [IGNORE] * len(inputs), config, source)


def _sample(
    context: Sequence[int], inputs: Sequence[int], targets: Sequence[int], config: ModelConfig, source: str
) -> Sample:
    if not context or context[-1] != config.gmask_token_id:
        raise TrainingError(f"a context of {len(context)} tokens does not end in [gMASK] (id {config.gmask_token_id})")
    total = len(context) + len(inputs)
    if total > config.max_sequence_length:
        raise TrainingError(
            f"context and answer have {total} tokens, the model holds {config.max_sequence_length}",
            cure="leave out long answers, or lower max_new_tokens",
        )
    layout = Layout.of_contexts([len(context)], total=len(context) + 1)  # no padding in front
    places = generation_positions(layout, total, config)[0].numpy()
    positions = places if places.ndim == 2 else np.stack((places, np.zeros_like(places)))
    return Sample(
        ids=np.array([*context, *inputs], dtype=np.int32),
        targets=np.array([IGNORE] * len(context) + list(targets), dtype=np.int32),
        positions=positions.astype(np.int32),
        context_length=len(context),
        objective="dialogue",
        source=source,
    )


def one_a_row(samples: Iterable[Sample]) -> Batch:
    """A batch with one sample in each row, in order."""
    return collate([[sample] for sample in samples])


def answer_numbers(batch: Batch) -> Tensor:
    """Which sample of the batch each position belongs to, int64 [batch, tokens]; -1 for padding.

    Samples are numbered in order, row after row, as they were collated.
    """
    held = batch.document.max(dim=1).values + 1  # samples of each row
    before = held.cumsum(0) - held
    return torch.where(batch.document == PADDING, PADDING, batch.document + before[:, None]).long()


def last_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and column, int64 [samples] each, of every sample's last real token."""
    numbers = answer_numbers(batch)
    following = torch.nn.functional.pad(numbers[:, 1:], (0, 1), value=PADDING)
    rows, columns = ((numbers != following) & (numbers != PADDING)).nonzero(as_tuple=True)
    return rows, columns


def actions_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of every action, and the sample it belongs to: int64 [actions] each, row after row."""
    rows, columns = (batch.targets != IGNORE).nonzero(as_tuple=True)
    return rows, columns, answer_numbers(batch)[rows, columns]


def sum_by_answer(values: Tensor, answer: Tensor, answers: int) -> Tensor:
    """The sum of `values` [actions] over each answer, [answers]."""
    return values.new_zeros(answers).index_add(0, answer, values)


def mean_by_answer(values: Tensor, answer: Tensor, answers: int) -> Tensor:
    """The mean of `values` [actions] over each answer, [answers]; 0 where there is no action."""
    counts = sum_by_answer(torch.ones_like(values), answer, answers)
    return sum_by_answer(values, answer, answers) / counts.clamp(min=1)
