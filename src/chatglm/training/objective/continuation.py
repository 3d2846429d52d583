"""Samples with one piece to generate: the rest of a text (`[gMASK]`), the answer to a prompt.

Source: GLM (ACL 2022) §2.1; GLM-130B §2.2 and its instruction samples; spec/training.md §1.5, §1.7.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from ..samples import IGNORE, IntArray, Sample
from .blank_filling import assemble
from .special_ids import SpecialIds

Encoding = Literal["2d", "1d"]
"""Whether positions have a second row that counts inside a span, or one row alone."""

LEAST_PROMPT_SHARE = 0.25
"""A prompt that is cut for room keeps at least this share of the window."""


def continue_text(
    text: IntArray, target_length: int, ids: SpecialIds, *, encoding: Encoding = "2d", limit: int | None = None
) -> Sample:
    """`source + [gMASK]`, then `sop + target[:-1]` → `target`: the last `target_length` tokens are generated.

    No eop is added; the text's own end ends it. In 2-D the target stands at `[gMASK]`, block 1, 2, …; in 1-D positions
    run on (GLM-130B).
    """
    border = len(text) - target_length
    inputs = np.concatenate([text[:border], [ids.gmask, ids.sop], text[border:-1]])
    targets = np.concatenate([np.full(border + 1, IGNORE), text[border:]])
    return assemble(
        inputs, targets, _positions(border + 1, target_length, runs_on=encoding == "1d"), border + 1, "document", limit
    )


def prompt_sample(
    prompt: IntArray,
    answer: IntArray,
    ids: SpecialIds,
    *,
    mask: int,
    window: int,
    objective: str = "instruction",
    encoding: Encoding = "2d",
    source: str = "",
) -> Sample:
    """`prompt + mask`, then `sop + answer` → `answer + eop`, fitted into `window` tokens.

    First the prompt loses its end, down to a quarter of the window, then the answer loses its own, with its eop; both
    are multi-task instruction samples as GLM-130B cut them. Cut targets are counted.
    """
    least = max(1, int(LEAST_PROMPT_SHARE * window))
    room = max(window - len(answer) - 2, min(least, len(prompt)))
    prompt = prompt[:room]
    context = len(prompt) + 1
    inputs = np.concatenate([prompt, [mask, ids.sop], answer])
    targets = np.concatenate([np.full(context, IGNORE), answer, [ids.eop]])
    runs_on = encoding == "1d" and mask == ids.gmask
    positions = _positions(context, len(answer) + 1, runs_on=runs_on)
    return replace(assemble(inputs, targets, positions, context, objective, window), source=source)


def _positions(context: int, generated: int, *, runs_on: bool) -> np.ndarray:
    """[2, context + generated] for one piece whose mask is the last token of the context."""
    after = np.arange(context, context + generated) if runs_on else np.full(generated, context - 1)
    first = np.concatenate([np.arange(context), after])
    return np.stack((first, np.concatenate([np.zeros(context, dtype=np.int64), np.arange(1, generated + 1)])))
