"""Questions from a pipe, and the choice of the reader; the keys are tested at a pseudo-terminal."""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path

import pytest

from chatglm.cli.question_reader import (
    EditorReader,
    LineReader,
    PipedReader,
    history_path,
    join_continued,
    open_reader,
)
from chatglm.cli.streams import Terminal


def read_all(text: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    reader, questions = PipedReader(), []
    while (question := reader.read()) is not None:
        questions.append(question)
    return questions


def test_each_piped_line_is_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_all("你好\r\n\nhello", monkeypatch) == ["你好", "", "hello"]


def test_a_trailing_backslash_continues_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_all("a\\\nb\\\n\nc\n", monkeypatch) == ["a\nb\n", "c"]
    assert read_all("a\\", monkeypatch) == ["a"]


def test_continued_lines_have_their_own_prompt() -> None:
    prompts: list[str] = []

    def line(prompt: str) -> str:
        prompts.append(prompt)
        return "a\\" if len(prompts) == 1 else "b"

    assert join_continued(line) == "a\nb"
    assert prompts == ["用户/You> ", "........> "]


def test_reader_fits_the_streams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_reader(Terminal(False, True, True)), PipedReader)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    assert isinstance(open_reader(Terminal(True, True, True)), LineReader)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_reader(Terminal(True, False, False)), LineReader)


def test_what_was_typed_is_kept_for_the_user_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_path("editor")
    assert path == tmp_path / "state" / "chatglm" / "history-editor"
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_without_a_place_to_write_there_is_no_history_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)
    assert history_path("editor") is None


def test_editor_is_preferred_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        monkeypatch.setattr("prompt_toolkit.output.create_output", lambda **_: DummyOutput())
        reader = open_reader(Terminal(True, True, True))
        assert isinstance(reader, EditorReader)
        keys.send_text("你\x1b\r好\\\r!\r")  # Alt-Enter, then a backslash and Enter, then Enter
        assert reader.read() == "你\n好\n!"
        keys.send_text("\x04")
        assert reader.read() is None
        keys.send_text("abc\x03xyz\r")
        assert reader.read() == "xyz"
        keys.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            reader.read()
