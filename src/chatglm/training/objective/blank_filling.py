"""A text with spans cut out → one sample: part A with a mask token for each span, part B with the spans.

Every span is `sop + tokens` in the input and `tokens + eop` in the targets. It stands at the position of its mask;
inside, the block position counts 1 (`sop`), 2, …. Source: GLM (ACL 2022) §2.1, §2.2; spec/training.md §1.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..samples import IGNORE, IntArray, Sample
from .spans import Span
from .special_ids import SpecialIds

HIDDEN_SHARE = 0.1
"""Share of part B's tokens that denoising hides from the input (GLM-10B)."""


def fill_spans(
    text: IntArray,
    spans: Sequence[Span],
    order: Sequence[int],
    ids: SpecialIds,
    *,
    mask: int,
    objective: str,
    limit: int | None = None,
    hide: np.random.Generator | None = None,
) -> Sample:
    """The sample of a text and its spans.

    text   [tokens] ids
    spans  in the order of the text, none overlapping
    order  of the spans in part B, as indices of `spans`
    mask   the id that stands for a span in part A
    limit  tokens that the sample may have; part B loses its end, and what it loses is counted
    hide   denoising: each token of part B's input becomes `[dBLOCK]` with probability 0.1
    """
    pieces: list[IntArray] = []
    mask_id = np.array([mask], dtype=np.int32)
    places: list[int] = []
    start = length = 0
    for span in spans:
        pieces += [text[start : span.start], mask_id]
        length += span.start - start + 1
        places.append(length - 1)
        start = span.stop
    context = np.concatenate([*pieces, text[start:]])
    inputs, targets, positions, block_positions = [context], [np.full(len(context), IGNORE)], [], []
    for index in order:
        tokens = text[spans[index].start : spans[index].stop]
        seen = tokens if hide is None else np.where(hide.random(len(tokens)) < HIDDEN_SHARE, ids.hidden, tokens)
        inputs += [np.array([ids.sop]), seen]
        targets += [tokens, np.array([ids.eop])]
        positions.append(np.full(len(tokens) + 1, places[index]))
        block_positions.append(np.arange(1, len(tokens) + 2))
    return assemble(
        np.concatenate(inputs),
        np.concatenate(targets),
        np.stack(
            (
                np.concatenate([np.arange(len(context)), *positions]),
                np.concatenate([np.zeros(len(context), dtype=np.int64), *block_positions]),
            )
        ),
        len(context),
        objective,
        limit,
    )


def assemble(
    ids: np.ndarray, targets: np.ndarray, positions: np.ndarray, context: int, objective: str, limit: int | None
) -> Sample:
    """The sample of whole arrays, cut at `limit` tokens; every target that the cut takes is counted."""
    keep = len(ids) if limit is None else min(limit, len(ids))
    return Sample(
        ids=ids[:keep].astype(np.int32),
        targets=targets[:keep].astype(np.int32),
        positions=positions[:, :keep].astype(np.int32),
        context_length=min(context, keep),
        objective=objective,
        cut_targets=int((targets[keep:] != IGNORE).sum()),
    )
