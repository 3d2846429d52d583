"""What the words of the chat do to a conversation."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.cells import cell_len

from chatglm.cli.conversation import Conversation
from chatglm.cli.slash_commands import ALIASES, Outcome, SlashCommands, changed_settings
from chatglm.cli.streams import Terminal
from chatglm.errors import RequestError

ROUNDS = [("一", "1"), ("二", "2")]


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(list(ROUNDS))


@pytest.fixture
def commands(conversation: Conversation) -> SlashCommands:
    return SlashCommands(conversation, Terminal(True, False, False), "ChatGLM mini")


@pytest.mark.parametrize("line", ["/clear", " /clear ", "clear", "clear ", "/清空"])
def test_clear_forgets_the_rounds(line: str, commands: SlashCommands, conversation: Conversation) -> None:
    assert commands.run(line) == Outcome()
    assert conversation.rounds == []


@pytest.mark.parametrize("line", ["/exit", "stop", "/quit", "/退出"])
def test_exit_and_the_originals_stop_leave(line: str, commands: SlashCommands) -> None:
    assert commands.run(line) == Outcome(leaves=True)


QUESTIONS = [
    "clear the table",
    "stop it",
    "你好",
    "/etc/hosts 是什么",
    "/ a",
    "a /clear",
    "//clear",
    "",
    "/clear\nmore",
    "/x\ny",
]


@pytest.mark.parametrize("line", QUESTIONS)
def test_a_question_is_no_command(line: str, commands: SlashCommands, conversation: Conversation) -> None:
    assert commands.run(line) is None
    assert conversation.rounds == ROUNDS


def test_undo_takes_the_last_round(commands: SlashCommands, conversation: Conversation) -> None:
    assert commands.run("/undo") == Outcome()
    assert conversation.rounds == ROUNDS[:1]


def test_undo_and_regen_of_nothing_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    commands = SlashCommands(Conversation(), Terminal(True, False, False), "m")
    assert commands.run("/undo") == commands.run("/regen") == Outcome()
    assert "no round to take away" in capsys.readouterr().err


def test_regen_asks_the_last_question_again(commands: SlashCommands, conversation: Conversation) -> None:
    assert commands.run("/regen") == Outcome(question="二")
    assert conversation.rounds == ROUNDS[:1]


def test_regen_with_a_fixed_seed_says_that_nothing_will_change(
    commands: SlashCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.run("/set seed 7")
    commands.run("/regen")
    assert "the answer will be the same" in capsys.readouterr().err


def test_save_and_load_round_trip(commands: SlashCommands, conversation: Conversation, tmp_path: Path) -> None:
    commands.run("/set temperature 0")
    commands.run("/set system 你是助手")
    commands.run(f"/save {tmp_path / 'my talk.json'}")
    commands.run("/clear")
    commands.run("/set temperature none")
    commands.run("/set system none")
    commands.run(f"/load {tmp_path / 'my talk.json'}")
    assert (conversation.rounds, conversation.system, conversation.settings) == (ROUNDS, "你是助手", {"temperature": 0})


def test_save_without_a_name_picks_one_with_the_time(
    commands: SlashCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands.run("/save")
    assert [path.name.startswith("chatglm-2") for path in tmp_path.iterdir()] == [True]


def test_load_of_a_broken_file_keeps_the_conversation(
    commands: SlashCommands, conversation: Conversation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text("{")
    assert commands.run(f"/load {tmp_path / 'a.json'}") == Outcome()
    assert conversation.rounds == ROUNDS
    assert capsys.readouterr().err.count("\n") == 1


def test_set_changes_a_setting_under_either_spelling(commands: SlashCommands, conversation: Conversation) -> None:
    commands.run("/set top-p 0.9")
    commands.run("/set max_new_tokens 7")
    commands.run('/set stop "。" "a b"')
    commands.run("/set early_stopping on")
    assert conversation.settings == {"top_p": 0.9, "max_new_tokens": 7, "stop": ("。", "a b"), "early_stopping": True}


BAD = {
    "/set temperature -1": "temperature is -1; it must be a number from 0 to 100",
    "/set temperature warm": "temperature is 'warm'; it must be a number",
    "/set top_k 0.5": "top_k is 0.5; it must be a whole number",
    "/set temprature 1": "did you mean `temperature`?",
    "/set early_stopping maybe": "must be on or off",
    '/set stop "a': "stop: ",
}


@pytest.mark.parametrize("line", BAD)
def test_set_refuses_by_name_and_keeps_what_was(
    line: str, commands: SlashCommands, conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.run(line)
    assert BAD[line] in capsys.readouterr().err
    assert conversation.settings == {}


def test_set_alone_lists_every_setting_and_marks_changed_ones(
    commands: SlashCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.run("/set seed 3")
    commands.run("/set")
    shown = capsys.readouterr().err
    assert " * seed                   3\n" in shown
    assert "   temperature            0.95\n" in shown


def test_default_takes_a_setting_back() -> None:
    assert changed_settings({"seed": 3, "top_p": 0.5}, "seed", "default") == {"top_p": 0.5}


def test_settings_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(RequestError, match="exclude each other"):
        changed_settings({"stop": ("a",)}, "num_beams", "2")


def test_unknown_command_names_the_nearest(commands: SlashCommands, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run("/claer") == Outcome()
    assert "there is no command /claer; try /clear" in capsys.readouterr().err


def test_help_names_every_command_in_both_languages(
    commands: SlashCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.run("/help")
    shown = capsys.readouterr().err
    for word in {*ALIASES.values(), "clear, stop"}:
        assert word in shown
    assert "忘记整个对话" in shown
    assert "forget the whole conversation" in shown
    assert max(cell_len(line) for line in shown.splitlines()) < 80


def test_escape_sequences_in_a_loaded_question_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = SlashCommands(Conversation([("\x1b[2Jboo", "x")]), Terminal(True, False, False), "m")
    commands.run("/undo")
    assert "\x1b" not in capsys.readouterr().err
