"""Saved conversations: what goes in comes out, and a broken file is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm.cli.conversation import Conversation, ConversationFileError, write_beside

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(rounds=st.lists(st.tuples(texts, texts), max_size=4), system=st.none() | texts)
@settings(max_examples=40)
def test_saved_conversation_comes_back_equal(
    rounds: list[tuple[str, str]], system: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("saved") / "talk.json"
    before = Conversation(list(rounds), system, {"temperature": 0.0, "stop": ("。", "b")})
    before.save(path, "ChatGLM mini")
    assert Conversation.load(path) == before


def test_saved_file_says_what_it_is_and_which_model_spoke(tmp_path: Path) -> None:
    Conversation([("你好", "你好！")]).save(tmp_path / "a.json", "ChatGLM mini")
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (content["format"], content["version"], content["model"]) == ("chatglm-conversation", 1, "ChatGLM mini")
    assert content["rounds"] == [{"question": "你好", "answer": "你好！"}]


def test_history_of_the_original_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[["你好", "你好！"]]', encoding="utf-8")
    assert Conversation.load(tmp_path / "a.json").rounds == [("你好", "你好！")]


BROKEN = {
    "": "not JSON (line 1, column 1",
    '{"format": "chatglm-conversation", "rounds": [': "not JSON (line 1",
    '"text"': "not a conversation",
    "{}": "not a conversation saved by chatglm",
    '{"format": "chatglm-conversation"}': "`rounds` is not a list",
    '{"format": "chatglm-conversation", "rounds": [{"question": "a"}]}': "round 0 is not a question and an answer",
    '[["a", "b"], ["a", 1]]': "round 1 is not",
    '{"format": "chatglm-conversation", "rounds": [], "system": 3}': "`system` is not a text",
    '{"format": "chatglm-conversation", "rounds": [], "settings": {"temperature": -3}}': "temperature is -3",
    '{"format": "chatglm-conversation", "rounds": [], "settings": {"temprature": 1}}': "did you mean `temperature`",
    '{"format": "chatglm-conversation", "rounds": [], "settings": 3}': "`settings` is not an object",
    "[" * 100_000: "",
}


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:60])
def test_broken_file_is_one_line_that_names_file_and_fault(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConversationFileError) as caught:
        Conversation.load(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ")
    assert BROKEN[content] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConversationFileError, match="not a conversation"):
        Conversation.load(tmp_path / "a.json")


def test_missing_file_and_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConversationFileError, match=r"cannot be read.*No such file"):
        Conversation.load(tmp_path / "a.json")
    with pytest.raises(ConversationFileError, match=r"cannot be written.*No such file"):
        Conversation().save(tmp_path / "none" / "a.json", "m")


def test_failed_write_leaves_the_old_file_and_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_beside(target, "new \ud800")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
