"""Streamed answers: Markdown that settles part by part, plain text, JSON."""

from __future__ import annotations

import io
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatglm.cli import answer_writer
from chatglm.cli.answer_writer import JSONWriter, MarkdownWriter, PlainWriter, open_writer, settled_length
from chatglm.cli.streams import Terminal

ANSWER = """以下是一些方法：

1. 保持规律的作息，每天在同一时间上床。

2. 创造舒适的环境：

   - 安静
   - 黑暗

```python
print("hi")

print("there")
```

祝你好梦！"""


def test_settled_part_ends_before_the_last_paragraph() -> None:
    assert settled_length("a\n\nb") == 3
    assert settled_length("a\n\n") == 0
    assert settled_length("a\n\n   b") == 0
    assert settled_length("a\nb") == 0


def test_nothing_inside_a_code_fence_settles() -> None:
    assert settled_length("```\na\n\nb\n\nc") == 0
    text = "```\na\n\nb\n```\n\nend"
    assert settled_length(text) == text.index("end")


@given(st.text("a`~ \n-1.", max_size=80))
def test_what_settled_stays_settled(text: str) -> None:
    lengths = [settled_length(text[:end]) for end in range(len(text) + 1)]
    assert set(lengths) <= {0, lengths[-1]}
    assert lengths == sorted(lengths)


def screen(written: str, width: int = 60) -> str:
    """What a terminal shows after these characters, its two escapes interpreted: some lines up, erase below."""
    import re

    lines: list[str] = [""]
    row = column = 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", written):
        if part == "\n":
            row, column = row + 1, 0
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b"):
            count = int(re.sub(r"\D", "", part) or 1)
            if part.endswith("A"):
                row -= count
            elif part.endswith("J"):
                del lines[row + 1 :]
                lines[row] = lines[row][:column]
            continue
        else:
            lines[row] = lines[row][:column] + part + lines[row][column + 1 :]
            column += 1
        while len(lines) <= row:
            lines.append("")
    return "\n".join(line.rstrip() for line in lines).rstrip()


@pytest.mark.parametrize("seed", range(5))
def test_streamed_markdown_ends_as_if_it_had_come_at_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_writer, "REDRAW_S", 0.0)
    assert _streamed(ANSWER, random.Random(seed), height=30) == _streamed(ANSWER, None, height=30)


def test_an_answer_taller_than_the_screen_is_complete_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_writer, "REDRAW_S", 0.0)
    answer = "\n".join(f"line {number}" for number in range(30))
    assert _streamed(answer, random.Random(1), height=8) == answer


def _streamed(answer: str, rng: random.Random | None, height: int) -> str:
    from rich.console import Console

    out = io.StringIO()
    writer = MarkdownWriter(Terminal(True, True, True))
    writer.console = Console(
        file=out, force_terminal=True, width=60, height=height, color_system=None, legacy_windows=False
    )
    writer.begin()
    while answer and rng is not None:
        size = rng.randint(1, 9)
        writer.write(answer[:size])
        answer = answer[size:]
    writer.write(answer)
    writer.end("q", None)
    return screen(out.getvalue())


def test_three_dots_stand_until_the_first_piece(capsys: pytest.CaptureFixture[str]) -> None:
    writer = MarkdownWriter(Terminal(True, True, True))
    writer.begin()
    assert capsys.readouterr().out == "…\n"
    writer.write("\n\n")
    writer.write("one")
    writer.end("q", None)
    assert screen("…\n" + capsys.readouterr().out) == "one"
    writer.begin()
    writer.end("q", None)
    assert screen(capsys.readouterr().out) == ""


def test_a_second_answer_begins_on_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    writer = MarkdownWriter(Terminal(True, True, True))
    for text in ("one\n\ntwo", "three"):
        writer.begin()
        writer.write(text)
        writer.end("q", None)
    assert screen(capsys.readouterr().out) == "one\n\ntwo\nthree"


def test_answers_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    markdown, plain = MarkdownWriter(Terminal(True, True, True)), PlainWriter(for_terminal=True)
    for writer in (markdown, plain):
        writer.write("a\x1b[2Jb")
        writer.end("q", None)
        assert "a␛[2Jb" in capsys.readouterr().out


def test_piped_text_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    writer = PlainWriter()
    for piece in ("**a", "** \x1b", "<b>"):
        writer.write(piece)
    writer.end("q", None)
    assert capsys.readouterr().out == "**a** \x1b<b>\n"


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    from chatglm import Reply, Usage

    writer = JSONWriter()
    writer.write("你")
    writer.end("问", Reply("你\n好", [("问", "你\n好")], "stop", Usage(4, 2, 1), seed=9))
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "prompt": "问",
        "answer": "你\n好",
        "finish_reason": "stop",
        "usage": {"context_tokens": 4, "answer_tokens": 2, "dropped_rounds": 1},
        "seed": 9,
    }


def test_markdown_is_only_for_a_person_at_a_terminal() -> None:
    assert isinstance(open_writer(Terminal(True, True, True), as_json=False), MarkdownWriter)
    assert isinstance(open_writer(Terminal(True, False, True), as_json=False), PlainWriter)
    assert isinstance(open_writer(Terminal(False, True, True), as_json=False), PlainWriter)
    assert isinstance(open_writer(Terminal(True, True, True), as_json=True), JSONWriter)
