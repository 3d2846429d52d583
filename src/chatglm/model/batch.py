"""Rows of context and answer as one left-padded batch, for scoring and calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..config import ModelConfig
from .positions import Layout, generation_positions, prefix_blocked


def left_padded(
    contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], config: ModelConfig, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and mask of `padding | context | <sop> answer`, as the network takes them.

    contexts  ids that end in `[gMASK]`
    answers   ids that follow `<sop>`; may be empty
    returns   ids int64 [batch, total], positions [batch, 2, total] or [batch, total], blocked bool
              [batch, 1, total, total]
    """
    rows = [[*context, config.bos_token_id, *answer] for context, answer in zip(contexts, answers, strict=True)]
    total = max(map(len, rows))
    padding = [total - len(row) for row in rows]
    ids = [[config.pad_token_id] * pad + row for pad, row in zip(padding, rows, strict=True)]
    lengths = torch.tensor([len(context) for context in contexts], device=device)
    is_gmask = torch.ones_like(lengths, dtype=torch.bool)
    layout = Layout(lengths, lengths - 1, is_gmask, torch.tensor(padding, device=device))
    return (
        torch.tensor(ids, device=device),
        generation_positions(layout, total, config),
        prefix_blocked(layout, total),
    )


def by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of rows that run together: longest first, at most `most` tokens with padding (or one row)."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
