"""Files of prompts that a policy answers while it learns.

A line is a JSON object with `prompt`, and where there are such `history` and an answer to be measured against:
`reference`, or what other files call it (`response`, `chosen`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ...errors import TrainingError
from ...tokenizer import Tokenizer
from ..data.preferences import is_held_out
from .preferences import history_of
from .rollout import Prompt, make_prompt

REFERENCES = ("reference", "response", "chosen")


def read_prompts(path: str | Path, tokenizer: Tokenizer, *, most_tokens: int) -> list[Prompt]:
    """The prompts of a JSONL file, each once. Raises TrainingError with file and line.

    most_tokens  of a context; longer prompts are refused, because an answer would have no room
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror})", cure="data: {train: prompts.jsonl}") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: not UTF-8 (byte {error.start})", cure="store the file as UTF-8") from error
    found: dict[str, Prompt] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = _prompt(line, tokenizer)
        except ValueError as error:
            raise TrainingError(
                f"{path}:{number}: {error}", cure='a line is {"prompt": …}; see docs/rlhf.md'
            ) from error
        if len(prompt.context) > most_tokens:
            raise TrainingError(
                f"{path}:{number}: the prompt has {len(prompt.context)} tokens, {most_tokens} are allowed",
                cure="leave it out, or lower online.max_new",
            )
        found.setdefault(prompt.text, prompt)
    if not found:
        raise TrainingError(f"{path}: holds no prompts")
    return list(found.values())


def _prompt(line: str, tokenizer: Tokenizer) -> Prompt:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("prompt"), str) or not raw["prompt"].strip():
        raise ValueError("`prompt` is missing or empty")
    reference = next((raw[name] for name in REFERENCES if isinstance(raw.get(name), str) and raw[name].strip()), None)
    history = history_of(raw.get("history"))
    return make_prompt(tokenizer, raw["prompt"], history, reference=reference, source=str(raw.get("source") or ""))


def split_prompts(prompts: Iterable[Prompt], share: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from, and held-out ones, by a hash of the text and the seed."""
    train: list[Prompt] = []
    held: list[Prompt] = []
    for prompt in prompts:
        (held if is_held_out(prompt.text, share, seed) else train).append(prompt)
    return train, held
