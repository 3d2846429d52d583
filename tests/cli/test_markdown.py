"""Answers as they look on a terminal."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from chatglm.cli.markdown import AnswerMarkdown, line_breaks


def shown(markup: str, width: int = 40) -> list[str]:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(AnswerMarkdown(markup))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_lines_of_a_poem_stay_lines() -> None:
    assert shown("春眠不觉晓，\n处处闻啼鸟。") == ["春眠不觉晓，", "处处闻啼鸟。"]


def test_html_is_shown_and_not_eaten() -> None:
    assert shown("tags: <div> and <sop> <!-- x -->") == ["tags: <div> and <sop> <!-- x -->"]


def test_bold_loses_its_stars_and_a_list_gets_its_points() -> None:
    assert shown("- **好** a\n- b") == ["", " • 好 a", " • b"]


def test_code_keeps_its_signs() -> None:
    assert " a < b  # **x**" in shown("```\na < b  # **x**\n```")


def test_chinese_with_latin_words_fills_its_lines() -> None:
    lines = shown("你好！我是 mini，一个会说中文和 English 的对话模型，可以回答各种各样的问题。", width=20)
    assert lines == ["你好！我是 mini，一", "个会说中文和 English", "的对话模型，可以回答", "各种各样的问题。"]


def test_no_line_begins_with_a_closing_mark() -> None:
    for width in range(6, 24):
        lines = shown("一二三，四五六。七八（九十）一二！三四五六", width=width)
        assert not [line for line in lines if line[0] in "，。）！"]
        assert not [line for line in lines if line[-1] == "（"]


def test_english_breaks_between_words_only() -> None:
    assert shown("the quick brown fox jumps", width=10) == ["the quick", "brown fox", "jumps"]


def test_a_word_longer_than_the_line_is_cut() -> None:
    assert shown("a" * 25, width=10) == ["a" * 10, "a" * 10, "a" * 5]


@given(text=st.text("ab 你好，。（）x-", max_size=60), width=st.integers(2, 12))
def test_every_line_fits_and_nothing_is_lost(text: str, width: int) -> None:
    breaks = line_breaks(text, width)
    assert breaks == sorted(set(breaks))
    edges = [0, *breaks, len(text)]
    lines = [text[begin:end] for begin, end in itertools.pairwise(edges)]
    assert "".join(lines) == text
    assert all(cell_len(line.rstrip()) <= width for line in lines)


@pytest.mark.parametrize("markup", ["", "\n\n", "# ", "1.", "```", "> ", "| a |\n|--|", "[x](", "\\", "**", "`"])
def test_unfinished_markdown_does_not_fail(markup: str) -> None:
    shown(markup)
