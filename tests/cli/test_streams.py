"""Streams, colours, and text that a terminal or a pipe can take."""

from __future__ import annotations

import io
import sys

import pytest

from chatglm.cli.streams import Terminal, prepare_streams, visible


def text_stream(raw: bytes = b"", encoding: str = "utf-8") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(raw), encoding=encoding, errors="strict")


def test_malformed_input_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", text_stream(b"\xe4\xbd\n\xe5\xa5\xbd\n"))
    prepare_streams()
    assert sys.stdin.read() == "\ufffd\n好\n"


def test_ascii_streams_become_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", text_stream(encoding="ascii"))
    prepare_streams()
    sys.stdout.write("你好")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().decode() == "你好"  # type: ignore[attr-defined]


def test_characters_that_the_output_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", text_stream(encoding="gbk"))
    prepare_streams()
    sys.stdout.write("你😀")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().decode("gbk") == "你?"  # type: ignore[attr-defined]


def test_notes_go_to_stderr_and_quiet_keeps_only_complaints(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        terminal = Terminal(False, False, False, quiet=quiet)
        terminal.note("n")
        terminal.say("s")
        terminal.complain("c")
    assert capsys.readouterr() == ("", "n\ns\nc\nc\n")


def test_colours_only_on_a_terminal_that_wants_them(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(False, False, shows_notes=True).complain("a")
    Terminal(False, False, shows_notes=True, has_colour=False).complain("b")
    assert capsys.readouterr().err == "\x1b[31ma\x1b[0m\nb\n"


def test_no_color_and_dumb_terminals_are_obeyed() -> None:
    assert not Terminal.detect(environ={"NO_COLOR": "1"}).has_colour
    assert Terminal.detect(environ={"NO_COLOR": ""}).has_colour
    assert not Terminal.detect(environ={"TERM": "dumb"}).shows_notes


def test_closed_streams_are_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = text_stream()
    closed.close()
    monkeypatch.setattr(sys, "stdin", closed)
    monkeypatch.setattr(sys, "stdout", None)
    assert Terminal.detect().reads_keys is False
    assert Terminal.detect().shows_answers is False


def test_control_characters_become_pictures_and_text_stays() -> None:
    assert visible("a\x1b[2J\a\r\x7f\x9b你\n\t好") == "a␛[2J␇␍␡\ufffd你\n\t好"
