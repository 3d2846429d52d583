"""Where the questions come from: an editor line, a plain terminal line, or a pipe.

A trailing backslash continues a question on the next line in all three; Alt-Enter does so in the editor.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from .language import both
from .streams import Terminal

PROMPT = "用户/You> "
CONTINUED = "........> "


class QuestionReader(Protocol):
    """Gives one question at a time."""

    def read(self) -> str | None:
        """The next question, or None at the end. Raises KeyboardInterrupt when Ctrl-C asks to leave."""
        ...


class PipedReader:
    """Lines of standard input that is no terminal; nothing is echoed or prompted."""

    def read(self) -> str | None:
        return join_continued(self._line)

    @staticmethod
    def _line(_: str) -> str | None:
        line = sys.stdin.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None


class LineReader:
    """`input()` with readline where Python has it. Ctrl-C empties a line that has text, else it leaves."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._interrupted = ""
        try:
            import readline
        except ImportError:
            self._typed: Callable[[], str] = str
        else:
            self._typed = readline.get_line_buffer
            load_history_file(readline)

    def read(self) -> str | None:
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            while True:
                self._interrupted = ""
                try:
                    return join_continued(self._line)
                except KeyboardInterrupt:
                    sys.stderr.write("\n")
                    if not self._interrupted:
                        raise
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = self._typed()  # only here: readline forgets the line before the exception arrives
        raise KeyboardInterrupt

    def _line(self, prompt: str) -> str | None:
        if not self._terminal.shows_answers:  # input() would write the prompt among the answers
            sys.stderr.write(prompt)
            sys.stderr.flush()
            prompt = ""
        try:
            return input(prompt)
        except EOFError:
            sys.stderr.write("\n")
            return None


class EditorReader:
    """prompt_toolkit: several lines, wide characters, a history file. Enter sends, Alt-Enter makes a new line."""

    def __init__(self, terminal: Terminal) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.formatted_text import FormattedText
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.output import ColorDepth, create_output

        path = history_path("editor")
        style = "bold ansigreen" if terminal.has_colour else ""
        self._message = FormattedText([(style, PROMPT)])
        self._session: PromptSession[str] = PromptSession(
            history=FileHistory(str(path)) if path else InMemoryHistory(),
            multiline=True,
            key_bindings=_key_bindings(),
            prompt_continuation=lambda width, line, wrapped: " " * width,
            output=create_output(always_prefer_tty=True),
            color_depth=None if terminal.has_colour else ColorDepth.DEPTH_1_BIT,
        )

    def read(self) -> str | None:
        try:
            return self._session.prompt(self._message).replace("\\\n", "\n")
        except EOFError:
            return None


def _key_bindings() -> Any:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def empty_or_leave(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return bindings


def open_reader(terminal: Terminal) -> QuestionReader:
    """The best reader that works here."""
    if not terminal.reads_keys:
        return PipedReader()
    if os.environ.get("TERM") != "dumb" and (terminal.shows_answers or terminal.shows_notes):
        try:
            return EditorReader(terminal)
        except ImportError:
            pass
    return LineReader(terminal)


def hint(reader: QuestionReader) -> str:
    """One line on how to type here."""
    new_line = "Alt-Enter" if isinstance(reader, EditorReader) else "\\ + Enter"
    return both(
        f"Enter 发送，{new_line} 换行，/help 看命令；Ctrl-C 停止回答，再按离开。",
        f"Enter sends, {new_line}: new line, /help: commands; Ctrl-C stops, again leaves.",
        between="\n",
    )


def join_continued(line: Callable[[str], str | None]) -> str | None:
    """One question: lines are joined as long as they end in a backslash. None at the end of input."""
    first = line(PROMPT)
    if first is None:
        return None
    parts = [first]
    while parts[-1].endswith("\\"):
        parts[-1] = parts[-1][:-1]
        following = line(CONTINUED)
        if following is None:
            break
        parts.append(following)
    return "\n".join(parts)


def history_path(kind: str) -> Path | None:
    """The file that remembers what was typed, in the user's state folder; None where it cannot be written."""
    state = os.environ.get("XDG_STATE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        folder = (Path(state) if state else Path.home() / ".local" / "state") / "chatglm"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"history-{kind}"
        path.touch(mode=0o600)
        return path if os.access(path, os.R_OK | os.W_OK) else None
    except (OSError, RuntimeError):
        return None


def load_history_file(readline: Any) -> None:
    """Arrow-up brings earlier questions back, also of earlier days."""
    import atexit

    path = history_path("line")
    if path is None:
        return
    try:
        readline.read_history_file(path)
    except OSError:
        return
    readline.set_history_length(1_000)

    def keep() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)

    atexit.register(keep)
