"""Markdown for the terminal: rich's, with line breaks kept, HTML shown as text, and Chinese broken where it may be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, MarkdownElement, Paragraph

_NOT_FIRST = "，。、；：？！）》」』】〕”’…—,.;:?!)]}%"
"""Closing marks never begin a line."""

_NOT_LAST = "（《「『【〔“‘([{"
"""Opening marks never end a line."""

_WIDE = r"\u2E80-\u9FFF\uAC00-\uD7AF\uF900-\uFAFF\uFF00-\uFFEF"  # CJK, Hangul, full-width forms

_UNIT = re.compile(rf"\s+|[{_WIDE}]|[^\s{_WIDE}]+")


class WrappedParagraph(Paragraph):
    """A paragraph broken by `line_breaks`; rich would take a Chinese sentence for one long word."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.text.split("\n", allow_blank=True):
            for part in line.divide(line_breaks(line.plain, options.max_width)):
                part.rstrip()
                part.justify = "default"  # "left" would fill the line with blanks
                yield part


class AnswerMarkdown(Markdown):
    """The markdown of an answer."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "paragraph_open": WrappedParagraph}

    def __init__(self, markup: str) -> None:
        super().__init__("", hyperlinks=False, code_theme="ansi_dark")
        self.markup = markup
        self.parsed = _PARSER.parse(markup)
        for token in self.parsed:
            keep_line_breaks(token)


_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def keep_line_breaks(token: Token) -> None:
    """A poem's lines are lines, although Markdown would join them."""
    for child in token.children or ():
        if child.type == "softbreak":
            child.type = "hardbreak"


def line_breaks(text: str, width: int) -> list[int]:
    """Offsets at which `text`, which has no newline, is broken to lines of at most `width` cells.

    A line may end after a blank and on either side of a Chinese character, but not before a closing or after an opening
    mark. What is longer than a line is cut.
    """
    breaks: list[int] = []
    used = 0
    for start, unit in _unbreakable(text):
        room = width - used
        size = cell_len(unit.rstrip())
        if size > room and used:
            breaks.append(start)
            used = 0
        while size > width:  # longer than a whole line: cut it
            head = _fitting(unit, width)
            start, unit = start + head, unit[head:]
            breaks.append(start)
            size = cell_len(unit.rstrip())
        used += cell_len(unit)
    return breaks


def _unbreakable(text: str) -> Iterable[tuple[int, str]]:
    """(offset, part): parts inside which no line may end, each with the blanks behind it."""
    start, part = 0, ""
    for match in _UNIT.finditer(text):
        unit = match.group()
        glued = not part or unit.isspace() or unit[0] in _NOT_FIRST or part[-1] in _NOT_LAST
        if glued:
            part += unit
        else:
            yield start, part
            start, part = match.start(), unit
    if part:
        yield start, part


def _fitting(text: str, width: int) -> int:
    """How many characters of `text` fit into `width` cells; at least one."""
    used = 0
    for count, character in enumerate(text):
        used += cell_len(character)
        if used > width:
            return max(1, count)
    return len(text)
