"""`chatglm chat` at a pseudo-terminal, typed as a user types."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from command_line import PROGRAM, AtTerminal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

PROMPT = "用户/You> "
WITHOUT_EDITOR = (
    sys.executable,
    "-c",
    "import sys; sys.modules['prompt_toolkit'] = None; from chatglm.cli import main; main()",
)
EDITORS = {"editor": PROGRAM, "plain line": WITHOUT_EDITOR}
ANSWER_BEGUN = r"\n(?!loading)[^\n]*\w"  # a line of text after the line that was typed
CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"


@pytest.fixture(params=EDITORS)
def program(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if request.param == "editor":
        pytest.importorskip("prompt_toolkit")
    return EDITORS[request.param]


def test_interrupt_stops_the_answer_keeps_the_conversation_and_then_leaves(
    program: tuple[str, ...], tmp_path: Path
) -> None:
    with AtTerminal("chat", "--threads", "2", "--seed", "1", program=program, XDG_STATE_HOME=str(tmp_path)) as chat:
        shown = chat.wait_for(PROMPT)
        assert "ChatGLM mini" in shown
        chat.type("/set min_new_tokens 250" + ENTER)
        chat.wait_for("min_new_tokens = 250")
        chat.wait_for(PROMPT)
        chat.type("介绍一下北京" + ENTER)
        chat.wait_for("北京")  # what was typed
        chat.wait_for_match(ANSWER_BEGUN)
        chat.type(CTRL_C)
        chat.wait_for("(stopped)")
        chat.wait_for(PROMPT)
        chat.type("/undo" + ENTER)
        chat.wait_for("taken away: 介绍一下北京")
        chat.wait_for(PROMPT)
        chat.wait_until_asleep()
        chat.type(CTRL_C)
        assert chat.wait_for_exit() == 0
        assert "Traceback" not in chat.screen


def test_interrupt_empties_a_line_that_has_text(program: tuple[str, ...], tmp_path: Path) -> None:
    with AtTerminal("chat", "--threads", "2", program=program, XDG_STATE_HOME=str(tmp_path)) as chat:
        chat.wait_for(PROMPT)
        chat.type("/set max_new_tokens 2" + ENTER)
        chat.wait_for(PROMPT)
        chat.type("你好" + ENTER)
        chat.wait_for("cut at the limit")  # nothing is loading any more
        chat.wait_for(PROMPT)
        chat.type("/undo" + ENTER)
        chat.wait_for("taken away")
        chat.wait_for(PROMPT)
        chat.type("half a ques")
        chat.wait_for("ques")
        chat.wait_until_asleep()
        chat.type(CTRL_C)
        if program == WITHOUT_EDITOR:  # it is interrupted by a signal; the editor reads Ctrl-C as a key, in its turn
            chat.wait_for(PROMPT)
        chat.type("/undo" + ENTER)
        chat.wait_for("there is no round to take away")
        chat.wait_for(PROMPT)
        chat.type(CTRL_D)
        assert chat.wait_for_exit() == 0
        assert "Traceback" not in chat.screen


def test_leaving_while_the_model_loads_is_quick_and_clean(program: tuple[str, ...], tmp_path: Path) -> None:
    with AtTerminal("chat", "--threads", "2", program=program, XDG_STATE_HOME=str(tmp_path)) as chat:
        chat.wait_for(PROMPT)
        chat.type("/exit" + ENTER)
        assert chat.wait_for_exit() == 0
        assert "Traceback" not in chat.screen


def test_a_question_over_two_lines_reaches_the_model_as_one(program: tuple[str, ...], tmp_path: Path) -> None:
    with AtTerminal("chat", "--threads", "2", program=program, XDG_STATE_HOME=str(tmp_path)) as chat:
        chat.wait_for(PROMPT)
        chat.type("/set max_new_tokens 2" + ENTER)
        chat.wait_for("max_new_tokens = 2")
        chat.wait_for(PROMPT)
        chat.type("你好\\" + ENTER)
        chat.type("世界" + ENTER)
        chat.wait_for("cut at the limit of 2 tokens")
        chat.wait_for(PROMPT)
        chat.type("/save " + str(tmp_path / "talk.json") + ENTER)
        chat.wait_for("saved 1 round")
        chat.type("stop" + ENTER)
        assert chat.wait_for_exit() == 0
    assert '"question": "你好\\n世界"' in (tmp_path / "talk.json").read_text(encoding="utf-8")


def test_keys_typed_during_an_answer_wait_for_the_next_prompt(tmp_path: Path) -> None:
    with AtTerminal("chat", "--threads", "2", program=WITHOUT_EDITOR, XDG_STATE_HOME=str(tmp_path)) as chat:
        chat.wait_for(PROMPT)
        chat.type("/set min_new_tokens 60" + ENTER)
        chat.wait_for("min_new_tokens = 60")
        chat.wait_for(PROMPT)
        chat.type("介绍一下北京" + ENTER)
        chat.wait_for("北京")
        chat.wait_for_match(ANSWER_BEGUN)
        chat.type("/undo" + ENTER)
        answer = chat.wait_for(PROMPT)
        assert "/undo" not in answer
        chat.wait_for("taken away: 介绍一下北京")


def test_no_color_leaves_the_text_without_colours(tmp_path: Path) -> None:
    with AtTerminal("chat", program=WITHOUT_EDITOR, XDG_STATE_HOME=str(tmp_path), NO_COLOR="1") as chat:
        chat.wait_for(PROMPT)
        chat.type("/nonsense" + ENTER)
        chat.wait_for("there is no command")
        chat.wait_for(PROMPT)
        chat.type("stop" + ENTER)
        assert chat.wait_for_exit() == 0
        assert b"\x1b[3" not in chat.raw


def test_a_terminal_that_shows_nothing_else_gets_answers_apart(tmp_path: Path) -> None:
    out = tmp_path / "answers"
    line = f"exec {' '.join(PROGRAM)} chat --threads 2 --temperature 0 --max-new-tokens 12 > {out}"
    with AtTerminal("-c", line, program=("/bin/bash",), XDG_STATE_HOME=str(tmp_path)) as chat:
        chat.wait_for(PROMPT)
        chat.type("你好" + ENTER)
        chat.wait_for("你好")
        chat.wait_for(PROMPT)
        chat.type("stop" + ENTER)
        assert chat.wait_for_exit() == 0
    content = out.read_text(encoding="utf-8")
    assert content.count("\n") == 1
    assert "\x1b" not in content and "You>" not in content
