"""A chat without its terminal: questions in, answers and remarks out, with the embedded model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from chatglm import ChatModel, Reply
from chatglm.cli.answering import StopOnInterrupt, answer
from chatglm.cli.chat import Talk, embedded_greeting, greeting
from chatglm.cli.conversation import Conversation
from chatglm.cli.model_loading import BackgroundLoad
from chatglm.cli.source_folder import EMBEDDED_MODEL
from chatglm.cli.streams import Terminal
from chatglm.config import read_config
from chatglm.errors import DeviceError

GREEDY = {"temperature": 0.0, "max_new_tokens": 12}


class Script:
    """A reader of given questions."""

    def __init__(self, *lines: str) -> None:
        self._lines: Iterator[str] = iter(lines)

    def read(self) -> str | None:
        return next(self._lines, None)


class Paper:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.answers: list[str] = [""]
        self.replies: list[Reply | None] = []

    def begin(self) -> None:
        pass

    def write(self, text: str) -> None:
        self.answers[-1] += text

    def end(self, question: str, reply: Reply | None) -> None:
        self.answers.append("")
        self.replies.append(reply)


def talk(model: ChatModel, *lines: str, settings: dict[str, Any] | None = None) -> tuple[Conversation, Paper, int]:
    conversation, paper = Conversation(settings=dict(settings or GREEDY)), Paper()
    waiting = BackgroundLoad.finished(model)
    run = Talk(waiting, conversation, Script(*lines), paper, Terminal(False, False, False), "ChatGLM mini")
    return conversation, paper, run.run()


def test_answers_are_those_of_the_python_interface_with_the_same_history(model: ChatModel) -> None:
    conversation, paper, failures = talk(model, "你好", "你叫什么名字？")
    first = model.chat("你好", **GREEDY)
    second = model.chat("你叫什么名字？", first.history, **GREEDY)
    assert paper.answers[:2] == [first.text, second.text]
    assert conversation.rounds == second.history
    assert failures == 0


def test_blank_lines_are_no_questions(model: ChatModel) -> None:
    assert talk(model, "", "   ", "\n")[0].rounds == []


def test_nothing_is_asked_after_stop(model: ChatModel) -> None:
    assert talk(model, "stop", "你好")[0].rounds == []


def test_regen_replaces_the_last_answer(model: ChatModel) -> None:
    conversation, paper, _ = talk(model, "你好", "/regen")
    assert len(paper.replies) == 2
    assert len(conversation.rounds) == 1


def test_changed_settings_act_on_the_next_answer(model: ChatModel) -> None:
    _, paper, _ = talk(model, "你好", "/clear", "/set max_new_tokens 2", "你好")
    replies = [reply for reply in paper.replies if reply is not None]
    assert replies[1].usage.answer_tokens == 2 < replies[0].usage.answer_tokens


def test_cut_answer_is_remarked(model: ChatModel, capsys: pytest.CaptureFixture[str]) -> None:
    talk(model, "/set max_new_tokens 2", "介绍一下北京")
    assert "cut at the limit of 2 tokens" in capsys.readouterr().err


def test_dropped_rounds_are_remarked_and_stay_in_the_conversation(
    model: ChatModel, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation([("一二三四五六七八九十" * 150, "是"), ("二", "2")], settings=GREEDY)
    waiting = BackgroundLoad.finished(model)
    Talk(waiting, conversation, Script("你好"), Paper(), Terminal(False, False, False), "m").run()
    assert "the oldest 1 round did not fit into the context and stayed out" in capsys.readouterr().err
    assert len(conversation.rounds) == 3


def test_question_that_is_too_long_is_refused_and_the_chat_goes_on(
    model: ChatModel, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation, _, failures = talk(model, "很" * 2000, "你好")
    assert "are reserved for the answer" in capsys.readouterr().err
    assert [question for question, _ in conversation.rounds] == ["你好"]
    assert failures == 1


def test_stats_tell_path_and_speed(model: ChatModel, capsys: pytest.CaptureFixture[str]) -> None:
    talk(model, "你好", "/stats")
    shown = capsys.readouterr().err
    assert f"{model.dtype} on {model.device}" in shown
    assert "tokens/s" in shown
    assert "seed " in shown


def test_interrupt_keeps_what_was_said_and_gives_the_cache_back(model: ChatModel) -> None:
    class Impatient(Paper):
        def write(self, text: str) -> None:
            super().write(text)
            os.kill(os.getpid(), signal.SIGINT)

    cache, paper = model.engine.runner.cache, Impatient()
    free_before = cache.num_free_tokens
    conversation = Conversation(settings={"temperature": 0.0})
    answered = answer(model, conversation, "介绍一下北京", paper, can_stop=True)
    assert answered.reply is None
    assert conversation.rounds == [("介绍一下北京", paper.answers[0])]
    assert 0 < len(paper.answers[0]) < len(model.chat("介绍一下北京", temperature=0.0).text)
    assert cache.num_free_tokens == free_before


def test_every_token_gives_a_chance_to_stop_also_while_text_is_held_back(model: ChatModel) -> None:
    deltas = list(model.stream_chat("Hello!", temperature=0.0, min_new_tokens=30, stop=("zzz",)))
    assert deltas[-1].reply is not None
    assert len(deltas) == deltas[-1].reply.usage.answer_tokens + 1
    assert any(not delta.text for delta in deltas)


def test_second_interrupt_leaves(model: ChatModel) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopOnInterrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_without_stopping_an_interrupt_is_the_callers(model: ChatModel) -> None:
    class Interrupted(Paper):
        def write(self, text: str) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        answer(model, Conversation(settings=GREEDY), "你好", Interrupted(), can_stop=False)


def test_the_embedded_model_is_shown_the_rounds_of_the_questions_language_only(
    model: ChatModel, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation, paper, waiting = Conversation(settings=GREEDY), Paper(), BackgroundLoad.finished(model)
    script = Script("你好", "What can you do?")
    Talk(waiting, conversation, script, paper, Terminal(False, False, False), "m", keeps_languages_apart=True).run()
    assert paper.answers[1] == model.chat("What can you do?", **GREEDY).text
    assert [question for question, _ in conversation.rounds] == ["你好", "What can you do?"]
    assert "(1 round in the other language stayed out" in capsys.readouterr().err


def test_error_of_loading_in_the_background_comes_with_the_first_question() -> None:
    def fail() -> ChatModel:
        raise DeviceError("no such card")

    waiting = BackgroundLoad(fail)
    run = Talk(waiting, Conversation(), Script("/help", "你好"), Paper(), Terminal(False, False, False), "m")
    with pytest.raises(DeviceError, match="no such card"):
        run.run()
    assert waiting.is_done


def test_greeting_names_the_embedded_model_and_its_limits_in_both_languages() -> None:
    text = embedded_greeting(read_config(EMBEDDED_MODEL / "config.json"))
    for part in ("ChatGLM mini", "44 million", "1,024", "invents facts", "研究与演示", "会答错", "research"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) < 80


def test_greeting_of_another_model_has_size_and_path(model: ChatModel) -> None:
    text = greeting(model, "mine")
    assert text.startswith(f"mine: 44,153,856 parameters, context 1,024 tokens; {model.dtype} on {model.device}")
