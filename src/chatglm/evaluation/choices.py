"""Questions with a few possible answers: does the model find the right one the most likely?

A stand-in for general knowledge that a small model can be measured on: no answer has to be generated or judged. Each
option is scored as an answer to the bare question, by nats a token, `<eop>` included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..model import GLM
from ..tokenizer import Tokenizer
from ..tokenizer.examples import Example, dialogue_examples
from .scoring import score

OWN_QUESTIONS = Path(__file__).parent / "data" / "choices.jsonl"
"""Written for this purpose, Chinese and English; never trained on."""


@dataclass(frozen=True)
class Choice:
    """A question, its options, the number of the right one, and its language."""

    question: str
    options: tuple[str, ...]
    right: int
    language: str


def read_choices(path: Path = OWN_QUESTIONS) -> list[Choice]:
    """One object a line: `question`, `options`, `right` (from 0), `language`. Raises RequestError with the line."""
    choices = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            options = tuple(str(option) for option in entry["options"])
            choices.append(Choice(str(entry["question"]), options, int(entry["right"]), str(entry["language"])))
            options[choices[-1].right]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise RequestError(f"{path}, line {number}: no question with options ({error})") from error
    return choices


def choice_accuracy(
    model: GLM, tokenizer: Tokenizer, choices: Sequence[Choice], count: Callable[[int], None]
) -> dict[str, Any]:
    """Share of questions whose right option is the most likely, in all and for each language; and by chance."""
    limit = model.config.max_sequence_length
    examples: list[Example] = []
    for choice in choices:
        for option in choice.options:
            examples += dialogue_examples(tokenizer, [(choice.question, option)], limit)
    found = score(model, examples, count=count)
    nats = iter([float(part.mean()) for part in found.nats.split([len(one.answer_ids) for one in examples])])
    right: dict[str, list[bool]] = {}
    for choice in choices:
        costs = [next(nats) for _ in choice.options]
        right.setdefault(choice.language, []).append(costs.index(min(costs)) == choice.right)
    every = [hit for hits in right.values() for hit in hits]
    return {
        "questions": len(every),
        "accuracy": sum(every) / len(every),
        "by_chance": sum(1 / len(choice.options) for choice in choices) / len(choices),
        **{f"accuracy_{language}": sum(hits) / len(hits) for language, hits in sorted(right.items())},
    }
