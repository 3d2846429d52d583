"""How well a model fills blanks: one span of each piece of text behind `[MASK]`, filled greedily from both sides.

The samples of pre-training (spec/training.md §1.1) with one span; its length is drawn from Poisson(3) without 0, and is
at most LONGEST_BLANK. The random numbers of a blank depend on the seed and its number alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.kv_cache import KVCache
from ..engine.runner import Runner
from ..engine.sampler import Sampler
from ..engine.sampling import SamplingParams
from ..engine.scheduler import Engine
from ..engine.sequence import Sequence as Stream
from ..errors import RequestError
from ..model import GLM
from ..tokenizer import Tokenizer

PIECE_TOKENS = 64
"""Tokens of text around one blank, the blank counted."""

LONGEST_BLANK = 8

BATCH = 16


@dataclass(frozen=True)
class Blank:
    """Ids with one `[MASK]`, and the ids that stood there."""

    context_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def make_blanks(tokenizer: Tokenizer, texts: Sequence[str], *, seed: int = 0, most: int | None = None) -> list[Blank]:
    """One blank for each whole piece of PIECE_TOKENS tokens. Raises RequestError where no text is long enough."""
    blanks: list[Blank] = []
    for text in texts:
        ids = tokenizer.encode(text)
        for start in range(0, len(ids) - PIECE_TOKENS + 1, PIECE_TOKENS):
            if most is not None and len(blanks) == most:
                return blanks
            blanks.append(_blank(ids[start : start + PIECE_TOKENS], tokenizer.mask_id, f"{seed} {len(blanks)}"))
    if not blanks:
        raise RequestError(f"no text has {PIECE_TOKENS} tokens", cure="give longer text")
    return blanks


def _blank(ids: list[int], mask_id: int, seed: str) -> Blank:
    numbers = random.Random(seed)
    weights = [1.0]
    for length in range(2, LONGEST_BLANK + 1):
        weights.append(weights[-1] * 3 / length)
    (length,) = numbers.choices(range(1, LONGEST_BLANK + 1), weights)
    start = numbers.randrange(1, len(ids) - length)
    return Blank((*ids[:start], mask_id, *ids[start + length :]), tuple(ids[start : start + length]))


def fill(model: GLM, tokenizer: Tokenizer, blanks: Sequence[Blank], count: Callable[[int], None]) -> list[list[int]]:
    """What the model puts into each blank, greedily; it may say more than was there."""
    room = PIECE_TOKENS + 2 * LONGEST_BLANK + (model.config.pre_seq_len or 0)
    runner = Runner(model, KVCache(model.config, BATCH * -(-room // 16) * 16, model.dtype, model.device))
    engine = Engine(runner, Sampler(None, model.config.eos_token_id))
    found: list[list[int]] = []
    for start in range(0, len(blanks), BATCH):
        streams = [
            Stream.from_prompt_ids(
                [*blank.context_ids, tokenizer.sop_id],
                SamplingParams(temperature=0),
                max_new=LONGEST_BLANK + 4,
                sop_id=tokenizer.sop_id,
                gmask_id=tokenizer.gmask_id,
                mask_id=tokenizer.mask_id,
            )
            for blank in blanks[start : start + BATCH]
        ]
        engine.run(streams)
        found += [stream.generated_ids for stream in streams]
        count(len(streams))
    return found


def blank_accuracy(
    model: GLM, tokenizer: Tokenizer, blanks: Sequence[Blank], count: Callable[[int], None]
) -> dict[str, Any]:
    """Shares of blanks filled exactly and of the hidden tokens found at their place, and a few to look at."""
    with torch.inference_mode():
        filled = fill(model, tokenizer, blanks, count)
    pairs = list(zip(blanks, filled, strict=True))
    hidden = sum(len(blank.answer_ids) for blank in blanks)
    right = sum(a == b for blank, ids in pairs for a, b in zip(blank.answer_ids, ids, strict=False))
    decode = tokenizer.decode
    shown = [
        {"wanted": decode(list(blank.answer_ids)), "filled": decode(ids), "tokens": len(blank.answer_ids)}
        for blank, ids in pairs[:5]
    ]
    return {
        "blanks": len(blanks),
        "exact": sum(tuple(ids) == blank.answer_ids for blank, ids in pairs) / len(blanks),
        "tokens": hidden,
        "tokens_right": right / hidden,
        "first_right": sum(ids[:1] == [blank.answer_ids[0]] for blank, ids in pairs) / len(blanks),
        "examples": shown,
    }
