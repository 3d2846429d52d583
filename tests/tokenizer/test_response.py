"""Answers are post-processed as the original's `chat` does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatglm.tokenizer import normalize_answer


def test_recorded_answers_are_processed_as_by_the_original(golden: Path) -> None:
    recorded = json.loads((golden / "chat" / "prompts.json").read_text(encoding="utf-8"))["process_response"]
    pairs = [pair for era in recorded for pair in era["pairs"]]
    assert len(pairs) >= 60
    for given, expected in pairs:
        assert normalize_answer(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (" 你好,世界!a,b 好:x 1,好", "你好，世界！a,b 好：x 1，好"),
        ("中,,,文", "中，,，文"),
        ("好。(对)", "好。(对)"),
        (",[[训练时间]],x", ",2023年，x"),
    ],
)
def test_only_marks_beside_a_chinese_character_become_full_width(given: str, expected: str) -> None:
    assert normalize_answer(given) == expected


def test_processing_twice_changes_nothing_more() -> None:
    once = normalize_answer("  你好, a,b 是吗?!  [[训练时间]] ")
    assert normalize_answer(once) == once
