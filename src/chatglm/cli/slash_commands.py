"""What can be typed instead of a question: /clear, /undo, /regen, … and the original's `clear` and `stop`."""

from __future__ import annotations

import difflib
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..engine.sampling import SamplingParams
from ..errors import RequestError
from .conversation import Conversation, ConversationFileError
from .language import both
from .streams import Terminal, visible
from .units import plural


@dataclass(frozen=True)
class Outcome:
    """What the chat does after a command: go on, leave, or answer `question` (again)."""

    question: str | None = None
    leaves: bool = False


COMMANDS: dict[str, tuple[str, str]] = {
    "/help": ("命令一览", "this list"),
    "/clear": ("忘记整个对话", "forget the whole conversation"),
    "/undo": ("去掉最后一轮", "take the last round away"),
    "/regen": ("重新回答最后一个问题", "answer the last question again"),
    "/save [FILE]": ("保存对话（JSON）", "keep the conversation as JSON"),
    "/load FILE": ("读回保存的对话", "bring a saved conversation back"),
    "/set [NAME VALUE]": ("查看或改变设置", "show or change settings"),
    "/stats": ("上个回答的长度与速度", "length, speed of the last answer"),
    "/exit": ("离开", "leave"),
}
"""Usage → what it does, in Chinese and in English."""

ALIASES = {
    "clear": "/clear",  # the original's two words
    "stop": "/exit",
    "/quit": "/exit",
    "/bye": "/exit",
    "/retry": "/regen",
    "/?": "/help",
    "/清空": "/clear",
    "/撤销": "/undo",
    "/重答": "/regen",
    "/保存": "/save",
    "/读取": "/load",
    "/设置": "/set",
    "/帮助": "/help",
    "/退出": "/exit",
}

_COMMAND = re.compile(r"/[^\s/.]+\Z")
"""A first word that is meant as a command; a path such as /etc/hosts is not."""


class SlashCommands:
    """Runs commands on a conversation; what they say goes to stderr."""

    def __init__(self, conversation: Conversation, terminal: Terminal, model_name: str) -> None:
        self.conversation = conversation
        self.last_stats = both("还没有回答", "no answer yet")
        self._terminal = terminal
        self._model_name = model_name
        self._handlers: dict[str, Callable[[str], Outcome]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/undo": self._undo,
            "/regen": self._regen,
            "/save": self._save,
            "/load": self._load,
            "/set": self._set,
            "/stats": self._stats,
            "/exit": lambda _: Outcome(leaves=True),
        }

    def run(self, line: str) -> Outcome | None:
        """Do what the line says; None if it is a question."""
        word, _, rest = line.strip().partition(" ")
        is_alone = not rest and "\n" not in word
        if word in ALIASES and (word.startswith("/") or is_alone):
            word = ALIASES[word]
        if word in self._handlers:
            return self._handlers[word](rest.strip())
        if not _COMMAND.match(word) or "\n" in line:
            return None
        near = difflib.get_close_matches(word, [*self._handlers, *(a for a in ALIASES if a[0] == "/")], n=1)
        hint = near[0] if near else "/help"
        self._refuse(both(f"没有命令 {word}，试试 {hint}", f"there is no command {word}; try {hint}"))
        return Outcome()

    def _help(self, _: str) -> Outcome:
        for usage, (chinese, english) in COMMANDS.items():
            self._terminal.reply(f"  {usage:<18} {both(chinese, english)}")
        self._terminal.reply(f"  {'clear, stop':<18} {both('同 /clear、/exit', 'the same as /clear and /exit')}")
        self._terminal.reply(f"  {'...' + chr(92):<18} {both('行尾反斜杠续行', 'goes on in the next line')}")
        return Outcome()

    def _clear(self, _: str) -> Outcome:
        self.conversation.rounds.clear()
        self._done(both("对话已清空", "the conversation is empty"))
        return Outcome()

    def _undo(self, _: str) -> Outcome:
        if not self.conversation.rounds:
            return self._refuse(both("没有可撤销的轮次", "there is no round to take away"))
        question, _ = self.conversation.rounds.pop()
        self._done(both(f"已撤销：{_short(question)}", f"taken away: {_short(question)}"))
        return Outcome()

    def _regen(self, _: str) -> Outcome:
        if not self.conversation.rounds:
            return self._refuse(both("还没有问题", "there is no question yet"))
        question, _ = self.conversation.rounds.pop()
        seed = self.conversation.settings.get("seed")
        if seed is not None:
            self._done(
                both(
                    f"种子固定为 {seed}，回答会相同；/set seed none",
                    f"the seed is {seed}, so the answer will be the same; /set seed none",
                )
            )
        return Outcome(question=question)

    def _save(self, name: str) -> Outcome:
        path = Path(name or time.strftime("chatglm-%Y%m%d-%H%M%S.json")).expanduser()
        try:
            self.conversation.save(path, self._model_name)
        except ConversationFileError as error:
            return self._refuse(str(error))
        rounds = len(self.conversation.rounds)
        self._done(
            both(
                f"已保存 {rounds} 轮到 {path}；/load {path}", f"saved {plural(rounds, 'round')} to {path}; /load {path}"
            )
        )
        return Outcome()

    def _load(self, name: str) -> Outcome:
        if not name:
            return self._refuse("/load FILE")
        try:
            loaded = Conversation.load(Path(name).expanduser())
        except ConversationFileError as error:
            return self._refuse(str(error))
        mine = self.conversation
        mine.rounds[:], mine.system, mine.settings = loaded.rounds, loaded.system, loaded.settings
        rounds = len(mine.rounds)
        self._done(both(f"已读回 {rounds} 轮", f"{plural(rounds, 'round')} brought back"))
        return Outcome()

    def _set(self, words: str) -> Outcome:
        name, _, value = words.partition(" ")
        if not name:
            return self._show_settings()
        name = name.lstrip("-").replace("-", "_")
        if name == "system":
            self.conversation.system = None if value.strip().lower() in ("", "none") else value.strip()
            self._done(f"system = {self.conversation.system!r}")
            return Outcome()
        try:
            settings = changed_settings(self.conversation.settings, name, value.strip())
        except RequestError as error:
            return self._refuse(str(error))
        self.conversation.settings = settings
        self._done(f"{name} = {settings.get(name, getattr(SamplingParams(), name))!r}")
        return Outcome()

    def _show_settings(self) -> Outcome:
        params = SamplingParams.from_mapping(self.conversation.settings)
        for field in fields(SamplingParams):
            mark = "*" if field.name in self.conversation.settings else " "
            self._terminal.reply(f" {mark} {field.name:<22} {getattr(params, field.name)!r}")
        self._terminal.reply(f"   {'system':<22} {self.conversation.system!r}")
        return Outcome()

    def _stats(self, _: str) -> Outcome:
        self._terminal.reply(self.last_stats)
        return Outcome()

    def _done(self, text: str) -> None:
        self._terminal.reply(visible(text))

    def _refuse(self, text: str) -> Outcome:
        self._terminal.complain(visible(text))
        return Outcome()


def changed_settings(settings: dict[str, Any], name: str, value: str) -> dict[str, Any]:
    """`settings` with one more value, read from text. `none` or `default` takes a setting back.

    Raises RequestError naming the setting, the value and what is allowed.
    """
    SamplingParams.from_mapping({name: None} if name not in _field_names() else {})  # refuses an unknown name
    rest = {key: old for key, old in settings.items() if key != name}
    if value.lower() in ("none", "default"):
        return rest
    changed = {**rest, name: _parse(name, value)}
    SamplingParams.from_mapping(changed)
    return changed


def _field_names() -> set[str]:
    return {field.name for field in fields(SamplingParams)}


def _parse(name: str, value: str) -> Any:
    default = getattr(SamplingParams(), name)
    if isinstance(default, tuple):
        try:
            return tuple(shlex.split(value))
        except ValueError as error:
            raise RequestError(f"{name}: {error}") from error
    if isinstance(default, bool):
        if value.lower() not in _ON | _OFF:
            raise RequestError(f"{name} is {value!r}; it must be on or off")
        return value.lower() in _ON
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value  # SamplingParams names the range


_ON, _OFF = {"on", "true", "yes", "1"}, {"off", "false", "no", "0"}


def _short(text: str, length: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
