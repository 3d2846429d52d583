"""Chinese or English first."""

from __future__ import annotations

import pytest

from chatglm.cli.language import both, language_of, prefers_chinese, rounds_in_language_of

CASES = [
    ({"LANG": "zh_CN.UTF-8"}, True),
    ({"LANG": "en_US.UTF-8"}, False),
    ({"LANG": "C.UTF-8"}, False),
    ({"LANG": "zh_TW.UTF-8", "LC_ALL": "en_GB.UTF-8"}, False),
    ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, True),
    ({"LANG": "en_US.UTF-8", "LC_ALL": "", "LC_MESSAGES": "zh_CN"}, True),
]


@pytest.mark.parametrize(("environ", "is_chinese"), CASES, ids=str)
def test_locale_decides(environ: dict[str, str], is_chinese: bool) -> None:
    assert prefers_chinese(environ) is is_chinese


def test_both_texts_are_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LC_MESSAGES", raising=False)
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert both("好", "good") == "好  |  good"
    monkeypatch.setenv("LC_ALL", "C")
    assert both("好", "good") == "good  |  好"


TEXTS = {
    "你好": "zh",
    "Hello!": "en",
    "1 + 1 = ?": None,
    "": None,
    "翻译 hello world": "zh",
    "What does 你好 mean?": "en",
}


@pytest.mark.parametrize("text", TEXTS)
def test_language_of_a_question(text: str) -> None:
    assert language_of(text) == TEXTS[text]


def test_rounds_of_the_other_language_stay_out() -> None:
    rounds = [("你好", "好"), ("1+1", "2"), ("Hello", "hi")]
    assert rounds_in_language_of("再见", rounds) == rounds[:2]
    assert rounds_in_language_of("bye", rounds) == rounds[1:]
    assert rounds_in_language_of("2+2", rounds) == rounds
