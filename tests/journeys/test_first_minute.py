"""J1: the first minute with the embedded model, at a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from command_line import AtTerminal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

PROMPT = "用户/You> "


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


@pytest.mark.parametrize("locale", ["zh_CN.UTF-8", "en_US.UTF-8"])
def test_first_minute(locale: str, tmp_path: Path) -> None:
    with AtTerminal("chat", "--seed", "0", "--threads", "2", XDG_STATE_HOME=str(tmp_path), LANG=locale) as chat:
        greeting = chat.wait_for(PROMPT)
        assert "ChatGLM mini" in greeting
        assert "会答错" in greeting and "invents facts" in greeting
        assert (greeting.index("会答错") < greeting.index("invents")) == (locale == "zh_CN.UTF-8")

        chat.type("你好\r")
        chat.wait_for("你好\n")
        assert is_chinese(chat.wait_for(PROMPT).removesuffix(PROMPT))

        chat.type("What can you do?\r")
        chat.wait_for("do?\n")
        answer = chat.wait_for(PROMPT).removesuffix(PROMPT)
        assert answer.strip() and not is_chinese(answer)

        chat.type("/set min_new_tokens 250\r")
        chat.wait_for("= 250")
        chat.wait_for(PROMPT)
        chat.type("介绍一下北京\r")
        chat.wait_for("北京\n")
        chat.wait_for("。")
        chat.type("\x03")  # stops the answer
        chat.wait_for("(stopped)" if locale == "en_US.UTF-8" else "（已停止）")
        chat.wait_for(PROMPT)
        chat.wait_until_asleep()
        chat.type("\x03")  # leaves
        assert chat.wait_for_exit() == 0
        for unwanted in ("Traceback", "Warning", "warning:"):
            assert unwanted not in chat.screen
