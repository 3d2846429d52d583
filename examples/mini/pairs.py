"""Preference pairs from answers that are known and answers that a model gave: the known one is preferred.

python examples/mini/pairs.py prompts DIALOGUES.jsonl LEAVE-OUT.txt COUNT > prompts.jsonl
chatglm generate MODEL --prompts prompts.jsonl --out answers.jsonl
python examples/mini/pairs.py pairs answers.jsonl > pairs.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LONGEST = 240
"""Characters of a known answer: the small model's answers are short."""


def prompts(dialogues: Path, left_out: Path, count: int) -> Iterator[dict[str, Any]]:
    """So many single questions with their known answers, drawn with a fixed seed, none of a source that is left out."""
    forbidden = {line.replace("[*]", "*").replace("[?]", "?").replace("[[]", "[") for line in lines(left_out)}
    found = []
    for line in lines(dialogues):
        record = json.loads(line)
        turns = record["turns"]
        if len(turns) == 1 and len(turns[0][1]) <= LONGEST and record["source"] not in forbidden:
            found.append({"prompt": turns[0][0], "chosen": turns[0][1], "source": record["source"]})
    random.Random(0).shuffle(found)
    yield from found[:count]


def pairs(answers: Path) -> Iterator[dict[str, Any]]:
    """Pairs whose two answers differ."""
    for line in lines(answers):
        record = json.loads(line)
        given = record["answer"]
        if given.strip() and given.strip() != record["chosen"].strip():
            yield {
                "prompt": record["prompt"],
                "history": [],
                "chosen": record["chosen"],
                "rejected": given,
                "source": record["source"],
            }


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    made = prompts(Path(words[0]), Path(words[1]), int(words[2])) if what == "prompts" else pairs(Path(words[0]))
    for record in made:
        print(json.dumps(record, ensure_ascii=False))
