"""General ability, before and after a tuning: what one model can do, in numbers that a second one is held against.

Bits per byte of the project's dialogues and prose, the share of easy questions whose right answer is the likeliest, and
blanks filled. Weights are expanded to fp32, as in the suite `quality`.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint import check, open_checkpoint
from ..model import GLM
from ..tokenizer import Tokenizer
from ..tokenizer.examples import read_documents, read_examples
from .blanks import blank_accuracy, make_blanks
from .choices import choice_accuracy, read_choices
from .forms import STORED, form_named, model_in
from .quality import OWN_TEXT
from .scoring import score

MOST_BLANKS = 64

Progress = Callable[[int, int, str], None]

MEASURES = ("bits_per_byte", "choices", "blanks_exact", "blanks_tokens")
"""Names in a row; the first is better when it is smaller, the others when they are larger."""


def measure_ability(
    folders: Sequence[Path],
    *,
    files: Sequence[Path] = OWN_TEXT,
    device: torch.device | None = None,
    seed: int = 0,
    most: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A row for each model, and for all but the first its difference from the first (`change`).

    files: dialogues and text, whose plain texts are blanked too. most: so many dialogues or spans of each.
    """
    device = device or torch.device("cpu")
    for folder in folders:
        check(folder)
    rows: list[dict[str, Any]] = []
    for number, folder in enumerate(folders):
        if progress is not None:
            progress(number, len(folders), folder.name)
        tokenizer = Tokenizer.from_folder(folder, config=open_checkpoint(folder).config)
        model = model_in(folder, form_named(STORED), device)
        rows.append({"model": folder.name, **_row(model, tokenizer, files, seed, most)})
        del model
    for row in rows[1:]:
        row["change"] = {name: row[name] - rows[0][name] for name in MEASURES}
    return {
        "suite": "ability",
        "files": [file.name for file in files],
        "seed": seed,
        "device": str(device),
        "versions": {"chatglm": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }


def _row(model: GLM, tokenizer: Tokenizer, files: Sequence[Path], seed: int, most: int | None) -> dict[str, Any]:
    limit = model.config.max_sequence_length
    by_file = {file.name: score(model, read_examples(file, tokenizer, limit, most=most)) for file in files}
    texts = [text for file in files for text in read_documents(file) if isinstance(text, str)]
    blanks = blank_accuracy(model, tokenizer, make_blanks(tokenizer, texts, seed=seed, most=MOST_BLANKS), _nothing)
    choices = choice_accuracy(model, tokenizer, read_choices(), _nothing)
    nats, size = sum(float(one.nats.sum()) for one in by_file.values()), sum(one.bytes for one in by_file.values())
    return {
        "bits_per_byte": nats / size / math.log(2),
        "choices": choices["accuracy"],
        "blanks_exact": blanks["exact"],
        "blanks_tokens": blanks["tokens_right"],
        "files": {name: one.bits_per_byte for name, one in by_file.items()},
        "details": {"choices": choices, "blanks": blanks},
    }


def _nothing(_: int) -> None:
    """Progress is told a model at a time."""
