"""Which text a model is calibrated on, and what the record says about it.

The shipped text (data/calibration.jsonl, Chinese and English) was written for this purpose or sampled from the embedded
model; no evaluation text is in it. A dialogue is one example, from its first question to its last answer in the chat
template; a text gives one for each span.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..tokenizer import Tokenizer
from ..tokenizer.examples import Example, dialogue_examples, read_documents, text_examples

SHIPPED = Path(__file__).parent / "data" / "calibration.jsonl"

MOST_TOKENS = 98_304
"""192 rows of 512 tokens: more than the shipped text has."""

LONGEST_ROW = 1_024


@dataclass(frozen=True)
class CalibrationText:
    """Files to calibrate on, and how much of them.

    most_tokens  beyond it examples are left out, chosen by `seed`
    """

    files: tuple[Path, ...] = (SHIPPED,)
    most_tokens: int = MOST_TOKENS
    seed: int = 0

    def examples(self, tokenizer: Tokenizer, max_sequence_length: int) -> list[Example]:
        """Raises RequestError for a file that cannot be read and for text without any example."""
        limit = min(max_sequence_length, LONGEST_ROW)
        found: list[Example] = []
        for file in self.files:
            for document in read_documents(file):
                if isinstance(document, str):
                    found += text_examples(tokenizer, document, limit)
                else:
                    found += [*dialogue_examples(tokenizer, document, limit)][-1:]
        kept = _up_to(found, self.most_tokens, self.seed)
        if not kept:
            raise RequestError("the calibration text holds no example", cure="give dialogues or text in JSON lines")
        return kept

    def record(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What the checkpoint says: file names with their hashes, and how many tokens were used."""
        files = [{"file": file.name, "sha256": _sha256(file)} for file in self.files]
        return {"files": files, "examples": len(examples), "tokens": sum(map(len, examples)), "seed": self.seed}


def _up_to(examples: list[Example], most: int, seed: int) -> list[Example]:
    """All of them, or so many that their tokens are at most `most`, in their order."""
    chosen, tokens = [], 0
    order = list(range(len(examples)))
    if sum(map(len, examples)) > most:
        random.Random(seed).shuffle(order)
    for number in order:
        if tokens + len(examples[number]) <= most:
            chosen.append(number)
            tokens += len(examples[number])
    return [examples[number] for number in sorted(chosen)]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
