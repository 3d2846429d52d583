"""`chatglm chat`: the conversation at a terminal or through a pipe."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import typer

from ..config import ModelConfig, read_config
from ..errors import ChatGLMError
from .answer_writer import AnswerWriter, open_writer
from .answering import Answered, answer
from .conversation import Conversation
from .language import both, language_of, rounds_in_language_of
from .model_loading import BackgroundLoad, load
from .options import AdapterFolder, CommonOptions, PlacementOptions, SamplingOptions, Source
from .question_reader import QuestionReader, hint, open_reader
from .slash_commands import SlashCommands
from .source_folder import EMBEDDED_MODEL, with_adapter
from .streams import Terminal
from .units import plural

if TYPE_CHECKING:
    from ..chat import ChatModel


def chat(
    source: Source = None,
    *,
    adapter: AdapterFolder = None,
    placement: PlacementOptions,
    sampling: SamplingOptions,
    common: CommonOptions,
) -> None:
    """Talk with a model: one question a line, answers as they come. /help in the chat lists its commands.

    Piped, every line of standard input is a question of one conversation; answers go to stdout, all else to stderr.
    """
    terminal = common.terminal()
    conversation = Conversation(system=sampling.system, settings=sampling.settings())
    placement.check_devices()
    source, adapter = with_adapter(source, adapter)
    if source is None and adapter is None and placement.devices == 1:
        terminal.say(embedded_greeting(read_config(EMBEDDED_MODEL / "config.json")))
        reader = open_reader(terminal)
        waiting = BackgroundLoad(lambda: load(None, placement, Terminal(False, False, False)))
        name = "ChatGLM mini"
    else:
        model = load(source, placement, terminal, adapter)
        name = model.loaded.folder.name
        terminal.say(embedded_greeting(model.config) if source is None else greeting(model, name))
        reader = open_reader(terminal)
        waiting = BackgroundLoad.finished(model)
    if terminal.reads_keys:
        terminal.note(hint(reader))
    writer = open_writer(terminal, as_json=common.json)
    talk = Talk(waiting, conversation, reader, writer, terminal, name, keeps_languages_apart=source is None)
    try:
        failures = talk.run()
    except KeyboardInterrupt:
        is_goodbye = terminal.reads_keys and waiting.is_done  # a Ctrl-C that no answer needs
        if not waiting.is_done or placement.devices > 1:  # workers may wait in the middle of a step
            leave_now(0 if is_goodbye else 130)
        if not is_goodbye:
            raise
        sys.stderr.write("\n")
        failures = 0
    waiting.close()
    if not waiting.is_done:
        leave_now(0)
    if failures and not terminal.reads_keys:
        raise typer.Exit(1)


class Talk:
    """Question, answer, question, …

    keeps_languages_apart  the model is shown the earlier rounds of the question's language only: the embedded model,
                           which never saw a conversation in two languages, would stay in the first one
    """

    def __init__(
        self,
        waiting: BackgroundLoad,
        conversation: Conversation,
        reader: QuestionReader,
        writer: AnswerWriter,
        terminal: Terminal,
        name: str,
        *,
        keeps_languages_apart: bool = False,
    ) -> None:
        self._waiting = waiting
        self._conversation = conversation
        self._reader = reader
        self._writer = writer
        self._terminal = terminal
        self._commands = SlashCommands(conversation, terminal, name)
        self._keeps_languages_apart = keeps_languages_apart
        self._told_languages: set[str | None] = set()

    def run(self) -> int:
        """Until the questions end; the number of questions that failed. Raises KeyboardInterrupt when Ctrl-C leaves."""
        failures = 0
        while (line := self._reader.read()) is not None:
            outcome = self._commands.run(line)
            question: str | None = line
            if outcome is not None:
                if outcome.leaves:
                    break
                question = outcome.question
            if question and question.strip():
                failures += not self._ask(question, self._model())
        return failures

    def _model(self) -> ChatModel:
        if not self._waiting.is_done and self._terminal.reads_keys and self._terminal.shows_notes:
            sys.stderr.write(both("正在加载模型…", "loading the model …"))
            sys.stderr.flush()
            try:
                return self._waiting.result()
            finally:
                sys.stderr.write("\r\x1b[K")
        return self._waiting.result()

    def _ask(self, question: str, model: ChatModel) -> bool:
        rounds_before = list(self._conversation.rounds)
        shown = rounds_in_language_of(question, rounds_before) if self._keeps_languages_apart else rounds_before
        can_stop = self._terminal.reads_keys
        try:
            answered = answer(model, self._conversation, question, self._writer, can_stop=can_stop, rounds=shown)
        except ChatGLMError as error:
            self._conversation.rounds[:] = rounds_before
            self._terminal.complain(str(error))
            return False
        self._commands.last_stats = stats(model, answered)
        if len(shown) < len(rounds_before):
            self._remark_on_languages(question, len(rounds_before) - len(shown))
        self._remark(answered)
        if self._terminal.reads_keys:
            self._terminal.reply("")
        return answered.reply is None or answered.reply.finish_reason != "error"

    def _remark_on_languages(self, question: str, left_out: int) -> None:
        """Once in each language, and in the language of the question."""
        language = language_of(question)
        if language in self._told_languages:
            return
        self._told_languages.add(language)
        english = f"({plural(left_out, 'round')} in the other language stayed out: this small model would follow it)"
        chinese = f"（另一种语言的 {left_out} 轮没有放入：小模型会跟着用那种语言）"
        self._terminal.note(chinese if language == "zh" else english)

    def _remark(self, answered: Answered) -> None:
        """What a reader should know about this answer, one line each."""
        reply = answered.reply
        if reply is None:
            self._terminal.note(both("（已停止）", "(stopped)"))
            return
        if dropped := reply.usage.dropped_rounds:
            self._terminal.note(
                both(
                    f"最早的 {dropped} 轮已超出上下文，这次没有放入",
                    f"the oldest {plural(dropped, 'round')} did not fit into the context and stayed out",
                )
            )
        if reply.finish_reason == "length":
            tokens = reply.usage.answer_tokens
            self._terminal.note(
                both(
                    f"回答到 {tokens} token 的上限为止；/set max_new_tokens N",
                    f"cut at the limit of {plural(tokens, 'token')}; /set max_new_tokens N",
                )
            )
        if reply.finish_reason == "error":
            self._terminal.complain(reply.error or "")


def embedded_greeting(config: ModelConfig) -> str:
    """What the embedded model is and what it cannot do; needs no PyTorch."""
    millions, context = config.num_parameters / 1e6, config.max_sequence_length
    return both(
        f"ChatGLM mini：随包附带的演示模型，{millions * 100:,.0f} 万参数，上下文 {context:,} token。\n"
        "它会答错、会编造事实，长回答会重复；权重仅供研究与演示。",
        f"ChatGLM mini: the embedded demo, {millions:.0f} million parameters, context {context:,} tokens.\n"
        "It errs, invents facts and repeats itself. Weights for research and demo only.",
        between="\n",
    )


def greeting(model: ChatModel, name: str) -> str:
    """What was loaded, and on which path it runs."""
    config = model.config
    size = f"{config.num_parameters:,} parameters, context {config.max_sequence_length:,} tokens"
    return f"{name}: {size}; {path_taken(model)}"


def path_taken(model: ChatModel) -> str:
    """`int4 weights on cpu, 2 threads`: where and how the model runs."""
    import torch

    threads = f", {plural(torch.get_num_threads(), 'thread')}" if model.device.type == "cpu" else ""
    return f"{model.dtype} on {model.device}{threads} ({model.loaded.placement.reason})"


def stats(model: ChatModel, answered: Answered) -> str:
    """Path, length and speed of an answer in two lines."""
    parts = [f"first token {answered.first_token_s:.2f} s"]
    if answered.reply is not None:
        usage = answered.reply.usage
        rest = answered.seconds - answered.first_token_s
        if usage.answer_tokens > 1 and rest > 0:
            parts.append(f"{(usage.answer_tokens - 1) / rest:.1f} tokens/s")
        parts.append(f"context {usage.context_tokens} + answer {usage.answer_tokens} tokens")
        parts.append(f"seed {answered.reply.seed}")
    return f"{path_taken(model)}\n{' · '.join(parts)}"


def leave_now(code: int) -> None:
    """End the process while a thread still imports PyTorch: an ordinary exit would wait for it, or crash in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
