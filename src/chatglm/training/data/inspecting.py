"""Rows as the model sees them: ids, pieces, positions, who looks at whom, what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chatglm.tokenizer import Tokenizer

from ..masks import dense_blocked
from ..samples import IGNORE, Sample, collate

SEES, PARTLY, NOTHING = "█", "▒", "·"


def described_row(row: Sequence[Sample], tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """All facts of a row, sample by sample."""
    return {
        "length": length,
        "tokens": sum(map(len, row)),
        "loss_tokens": sum(sample.loss_tokens for sample in row),
        "samples": [described_sample(sample, tokenizer) for sample in row],
    }


def described_sample(sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    """One sample: lists of ids, pieces, positions, block positions and targets (None: no loss)."""
    targets = sample.targets.tolist()
    return {
        "objective": sample.objective,
        "source": sample.source,
        "context_length": sample.context_length,
        "cut_targets": sample.cut_targets,
        "ids": sample.ids.tolist(),
        "pieces": [piece(tokenizer, token) for token in sample.ids.tolist()],
        "positions": sample.positions[0].tolist(),
        "block_positions": sample.positions[1].tolist(),
        "targets": [None if target == IGNORE else target for target in targets],
        "target_pieces": [None if target == IGNORE else piece(tokenizer, target) for target in targets],
        "context": tokenizer.decode(sample.ids[: sample.context_length].tolist()),
        "trained": tokenizer.decode([target for target in targets if target != IGNORE]),
    }


def piece(tokenizer: Tokenizer, token: int) -> str:
    """The piece of an id, or its number where it has none."""
    return f"#{token}" if tokenizer.has_no_piece(token) else tokenizer.id_to_piece(token)


def mask_picture(row: Sequence[Sample], *, size: int = 72) -> list[str]:
    """The row's mask as lines of characters, query by query: what sees what. A large row is drawn in cells.

    Taken from the mask that training uses, not from its definition.
    """
    allowed: npt.NDArray[np.bool_] = ~dense_blocked(collate([row]))[0, 0].numpy()
    tokens = len(allowed)
    step = -(-tokens // size)
    lines: list[str] = []
    for query in range(0, tokens, step):
        cells = [allowed[query : query + step, key : key + step].mean() for key in range(0, tokens, step)]
        lines.append("".join(SEES if cell == 1 else NOTHING if cell == 0 else PARTLY for cell in cells))
    return lines
