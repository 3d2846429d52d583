"""How an answer appears: plain text as it comes, Markdown on a terminal, or one JSON object at the end."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from .streams import Terminal, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

    from ..chat import Reply

REDRAW_S = 0.06
"""Shortest time between two drawings of a growing paragraph."""


class AnswerWriter(Protocol):
    """Shows one answer after the other: begin, write …, end."""

    def begin(self) -> None:
        """The model has the question; its first token may take a while."""
        ...

    def write(self, text: str) -> None:
        """The next piece of the answer."""
        ...

    def end(self, question: str, reply: Reply | None) -> None:
        """The answer is over; no reply means that it was interrupted before it had one."""
        ...


class PlainWriter:
    """Pieces as they come, a newline at the end."""

    def __init__(self, *, for_terminal: bool = False) -> None:
        self._for_terminal = for_terminal

    def begin(self) -> None:
        pass

    def write(self, text: str) -> None:
        sys.stdout.write(visible(text) if self._for_terminal else text)
        sys.stdout.flush()

    def end(self, question: str, reply: Reply | None) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()


class JSONWriter:
    """One object a line for each answer."""

    def begin(self) -> None:
        pass

    def write(self, text: str) -> None:
        pass

    def end(self, question: str, reply: Reply | None) -> None:
        if reply is not None:
            print(json.dumps(answer_record(question, reply), ensure_ascii=False), flush=True)


def answer_record(question: str, reply: Reply) -> dict[str, Any]:
    """An answer as the JSON of `chat --json` and `generate` has it."""
    record: dict[str, Any] = {
        "prompt": question,
        "answer": reply.text,
        "finish_reason": reply.finish_reason,
        "usage": {
            "context_tokens": reply.usage.context_tokens,
            "answer_tokens": reply.usage.answer_tokens,
            "dropped_rounds": reply.usage.dropped_rounds,
        },
        "seed": reply.seed,
    }
    if reply.error is not None:
        record["error"] = reply.error
    return record


class MarkdownWriter:
    """Finished paragraphs stay on the screen; the growing one is redrawn in place, its last lines if it is too tall.

    The cursor rests at the beginning of the line below, where the `^C` that a terminal echoes does no harm.
    """

    def __init__(self, terminal: Terminal) -> None:
        from rich.console import Console

        self.console = Console(no_color=not terminal.has_colour, highlight=False)
        self._reset()

    def begin(self) -> None:
        self.console.file.write("…\n")
        self.console.file.flush()
        self._drawn_lines = 1

    def _reset(self) -> None:
        self._tail = ""
        self._has_printed = False
        self._drawn_lines = 0
        self._drawn_at = 0.0

    def write(self, text: str) -> None:
        self._tail += visible(text)
        while place := settled_length(self._tail):
            settled, self._tail = self._tail[:place], self._tail[place:]
            if settled.strip():
                self._show(settled)
                self._drawn_lines, self._has_printed = 0, True
        if self._tail.strip() and time.monotonic() - self._drawn_at >= REDRAW_S:
            self._show(self._tail, max_lines=self.console.height - 1)

    def end(self, question: str, reply: Reply | None) -> None:
        try:
            self._show(self._tail)
        finally:
            self._reset()

    def _show(self, markup: str, max_lines: int | None = None) -> None:
        """Draw a part in the place of what was drawn last, after one empty line if something stands above it."""
        from rich.segment import SegmentLines

        lines = rendered(markup, self.console)
        if self._has_printed:
            lines.insert(0, [])
        shown = lines if max_lines is None else lines[-max(1, max_lines) :]
        with self.console.capture() as capture:
            self.console.print(SegmentLines(shown, new_lines=True), end="")
        back = f"\x1b[{self._drawn_lines}A\x1b[J" if self._drawn_lines else ""
        self.console.file.write(back + capture.get())
        self.console.file.flush()
        self._drawn_lines, self._drawn_at = len(shown), time.monotonic()


def rendered(markup: str, console: Console) -> list[list[Segment]]:
    """The lines of some Markdown, without empty ones at the beginning."""
    from .markdown import AnswerMarkdown

    lines = console.render_lines(AnswerMarkdown(markup), pad=False)
    while lines and not "".join(segment.text for segment in lines[0]).strip():
        del lines[0]
    return lines


_FENCE = re.compile(r"^ {0,3}(```+|~~~+)")


def settled_length(text: str) -> int:
    """Length of the first part whose Markdown no later text can change: up to a blank line outside a code fence; or 0.

    A blank line settles nothing before the line after it has begun, or if that line is indented (it belongs to a list).
    """
    offset = 0
    fence: str | None = None
    after_blank = False
    for line in text.splitlines(keepends=True):
        if after_blank and line.strip() and not line[0].isspace() and fence is None:
            return offset
        mark = _FENCE.match(line)
        if mark and fence is None:
            fence = mark.group(1)
        elif mark and fence is not None and mark.group(1).startswith(fence):
            fence = None
        after_blank = fence is None and (not line.strip() if line.endswith("\n") else False)
        offset += len(line)
    return 0


def open_writer(terminal: Terminal, *, as_json: bool) -> AnswerWriter:
    """The writer for these streams. Markdown only where a person watches."""
    if as_json:
        return JSONWriter()
    if terminal.shows_answers and terminal.reads_keys:
        writer = MarkdownWriter(terminal)
        if not writer.console.legacy_windows:  # which cannot move the cursor up
            return writer
    return PlainWriter(for_terminal=terminal.shows_answers)
