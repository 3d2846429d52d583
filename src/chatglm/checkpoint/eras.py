"""Files of different releases in one folder: found by ids and rows, and named with both eras.

On 2023-04-06 the 20,000 image tokens were dropped: every id moved down, and the matrices lost as many rows. Neither
the files nor the config carry a version (spec/chatglm-6b.md §1.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import IMAGE_TOKENS, Era
from .folder import CONFIG
from .layout import EMBEDDING
from .problem import PULL, Problem
from .releases import ERA_DATES
from .tensor_file import TensorEntry

ROWS: dict[Era, int] = {"pre-slim": 150_528, "slim": 130_528}
FIRST_SOP = 150_004
"""`<sop>` of the first release, and what the original class assumes when config.json is silent."""


def era_of_rows(rows: int) -> Era | None:
    """The era of an embedding with so many rows, or None for a vocabulary of another size."""
    return next((era for era, count in ROWS.items() if count == rows), None)


def era_of_ids(config: Mapping[str, Any]) -> Era | None:
    """The era of the special ids in a raw config.json, or None for ids of a smaller vocabulary."""
    bos = config.get("bos_token_id", FIRST_SOP)
    if bos == FIRST_SOP:
        return "pre-slim"
    return "slim" if bos == FIRST_SOP - IMAGE_TOKENS else None


def era_problem(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Problem | None:
    """The problem of ids and weights of two eras, or None. config: the raw config.json."""
    ids, embedding = era_of_ids(config), tensors.get(EMBEDDING)
    weights = None if embedding is None else era_of_rows(embedding.shape[0])
    if embedding is None or ids is None or weights is None or ids == weights:
        return None
    return Problem(
        CONFIG,
        f"has {ids} ids (<sop> is {config.get('bos_token_id', FIRST_SOP)}; {ERA_DATES[ids]}), but "
        f"{embedding.file.name} has {weights} weights ({embedding.shape[0]:,} rows; {ERA_DATES[weights]})",
        f"take config, tokenizer files and weights from one release ({PULL}); a whole pre-slim folder becomes slim by "
        "`chatglm convert --to-slim`",
        str(embedding),
    )
