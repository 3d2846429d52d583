"""Answers of whole models to a file of questions: BLEU and ROUGE against wanted answers, or judged by a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..chat import ChatModel, load
from ..engine.sampling import SamplingParams
from ..errors import RequestError
from .judges import Judge, judged_rate, win_rate
from .pairs import Pair
from .text_metrics import text_metrics

BATCH = 16
GREEDY: Mapping[str, Any] = {"temperature": 0.0}

Count = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Answering:
    """How models answer: `sampling` as `ChatModel.generate` takes it, greedy by default; answer i has seed + i."""

    dtype: str = "auto"
    device: str = "auto"
    sampling: Mapping[str, Any] = field(default_factory=lambda: GREEDY)
    seed: int = 0
    max_new_tokens: int = 128

    def answers(self, model: ChatModel, pairs: Sequence[Pair], count: Callable[[int], None]) -> list[str]:
        """One answer a pair; questions without rounds before them run as batches."""
        found = [""] * len(pairs)
        bare = [number for number, pair in enumerate(pairs) if not pair.history]
        for start in range(0, len(bare), BATCH):
            part = bare[start : start + BATCH]
            settings = [self._settings(number) for number in part]
            replies = model.generate([pairs[number].prompt for number in part], settings)
            for number, reply in zip(part, replies, strict=True):
                found[number] = reply.text
            count(len(part))
        for number in sorted(set(range(len(pairs))) - set(bare)):
            pair = pairs[number]
            own = {**self.sampling, "seed": self.seed + number, "max_new_tokens": self.max_new_tokens}
            found[number] = model.chat(pair.prompt, list(pair.history), **own).text
            count(1)
        return found

    def _settings(self, number: int) -> SamplingParams:
        own = {**self.sampling, "seed": self.seed + number, "max_new_tokens": self.max_new_tokens}
        return SamplingParams.from_mapping(own)


def measure_answers(
    folders: Sequence[Path],
    pairs: Sequence[Pair],
    answering: Answering,
    *,
    judge: Judge | None = None,
    count: Count | None = None,
) -> dict[str, Any]:
    """One row a model: BLEU-4 and ROUGE where all pairs have answers; with a judge the share that passes.

    The win-rate is against the first model's answers, or against the wanted ones where there is one model. The
    answers themselves are under `answers`. Raises RequestError where there is nothing to measure.
    """
    wanted = [pair.answer for pair in pairs]
    has_wanted = all(answer is not None for answer in wanted)
    if not has_wanted and judge is None:
        raise RequestError("the file has no wanted answers", cure="add them, or give a judge")
    done, total = 0, len(folders) * len(pairs)
    texts: list[list[str]] = []
    for folder in folders:

        def tell(number: int, name: str = folder.name) -> None:
            nonlocal done
            done += number
            if count is not None:
                count(done, total, name)

        model = load(folder, answering.dtype, answering.device, threads=torch.get_num_threads())
        texts.append(answering.answers(model, pairs, tell))
        del model
    rows = []
    prompts = [pair.prompt for pair in pairs]
    against = texts[0] if len(folders) > 1 else [answer or "" for answer in wanted] if has_wanted else None
    for folder, own in zip(folders, texts, strict=True):
        row: dict[str, Any] = {"model": folder.name}
        if has_wanted:
            row |= text_metrics(own, [answer or "" for answer in wanted])
        if judge is not None:
            row["judged"] = judged_rate(judge, prompts, own)
            if against is not None and own is not against:
                row["win_rate"] = win_rate(judge, prompts, own, against).rate
        row["characters"] = sum(map(len, own)) / len(own)
        rows.append(row)
    return {
        "suite": "answers",
        "questions": len(pairs),
        "sampling": {**answering.sampling, "seed": answering.seed, "max_new_tokens": answering.max_new_tokens},
        "win_rate_against": (folders[0].name if len(folders) > 1 else "wanted answers") if judge else None,
        "rows": rows,
        "answers": [
            {"prompt": pair.prompt, "labels": pair.answer, "predict": [own[number] for own in texts]}
            for number, pair in enumerate(pairs)
        ],
    }
