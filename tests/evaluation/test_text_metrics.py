"""BLEU-4 and ROUGE as the official script counts them."""

from __future__ import annotations

import sys

import pytest

from chatglm.errors import MissingExtraError
from chatglm.evaluation.text_metrics import NAMES, scores_of, text_metrics

ANSWER, WANTED = "这件衣服很好看，适合春天穿。", "这款衣服非常好看，春天穿着很合适。"


@pytest.fixture(autouse=True)
def needs_the_libraries() -> None:
    for name in ("jieba", "nltk", "rouge_chinese"):
        pytest.importorskip(name)


def test_rouge_is_the_f_of_jieba_words_and_bleu_that_of_characters() -> None:
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    found = scores_of(ANSWER, WANTED)
    ours, theirs = set(jieba.cut(ANSWER)), set(jieba.cut(WANTED))
    both = len(ours & theirs)
    assert found["rouge-1"] == pytest.approx(100 * 2 * both / (len(ours) + len(theirs)), abs=1e-3)
    smoothing = SmoothingFunction().method3
    assert found["bleu-4"] == 100 * sentence_bleu([list(WANTED)], list(ANSWER), smoothing_function=smoothing)


def test_the_wanted_answer_itself_has_the_full_score_and_an_empty_one_none() -> None:
    assert all(value == pytest.approx(100, abs=1e-3) for value in scores_of(WANTED, WANTED).values())
    assert scores_of("", WANTED) == dict.fromkeys(NAMES, 0.0)
    assert text_metrics([WANTED, ""], [WANTED, WANTED])["rouge-l"] == pytest.approx(50, abs=1e-3)


def test_without_the_libraries_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(MissingExtraError, match=r"chatglm\[eval\]"):
        scores_of("a", "b")
