"""BLEU-4 and ROUGE as the official fine-tuning script counts them (spec/chatglm-6b.md §8.4).

BLEU-4: of characters, one sentence at a time, smoothing method 3. ROUGE: F of words that jieba cuts. Means over
answers, times 100. The libraries of the extra `eval` do the counting.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

from ..errors import MissingExtraError

NAMES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


def text_metrics(answers: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Mean scores of answers against the wanted ones, 0 … 100. Raises MissingExtraError without the extra `eval`."""
    scores = [scores_of(answer, reference) for answer, reference in zip(answers, wanted, strict=True)]
    return {name: sum(score[name] for score in scores) / max(1, len(scores)) for name in NAMES}


def scores_of(answer: str, wanted: str) -> dict[str, float]:
    """The four scores of one answer. One that is empty, or has no words, gets 0."""
    jieba, rouge, bleu = (_library(name) for name in ("jieba", "rouge_chinese", "nltk.translate.bleu_score"))
    smoothing = bleu.SmoothingFunction().method3
    found = {"bleu-4": 100 * float(bleu.sentence_bleu([list(wanted)], list(answer), smoothing_function=smoothing))}
    ours, theirs = (" ".join(jieba.cut(text)) for text in (answer, wanted))
    if ours.strip(" .") and theirs.strip(" ."):
        (parts,) = rouge.Rouge().get_scores(ours, theirs)
        found |= {name: 100 * float(parts[name]["f"]) for name in NAMES[1:]}
    return dict.fromkeys(NAMES, 0.0) | found


def _library(name: str) -> Any:
    try:
        with warnings.catch_warnings():  # jieba's own regular expressions warn on newer Pythons
            warnings.simplefilter("ignore")
            library = importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(name.partition(".")[0], extra="eval", purpose="BLEU and ROUGE") from error
    if name == "jieba":
        library.setLogLevel("WARNING")
    return library
