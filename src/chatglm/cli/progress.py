"""What a person sees while something takes long: a line at once, a bar after a moment. On a terminal's stderr only."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from .streams import Terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE_S = 0.7
"""What is done sooner shows no bar."""


class ProgressBar:
    """A callable `(done, total, what)` in bytes (or in items) that the slow parts report to; a context manager."""

    def __init__(self, terminal: Terminal, *, unit: str = "bytes") -> None:
        self._is_shown = terminal.shows_notes and not terminal.quiet
        self._has_colour = terminal.has_colour
        self._unit = unit
        self._begin = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._has_line = False

    def say(self, what: str) -> None:
        """One line at once, in the place of the one before; gone when the bar comes or the block ends."""
        if self._is_shown and self._bar is None:
            sys.stderr.write(f"\r{what} …\x1b[K")
            sys.stderr.flush()
            self._has_line = True

    def _clear_line(self) -> None:
        if self._has_line:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._has_line = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear_line()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, done: int, total: int, what: str) -> None:
        if not self._is_shown or time.monotonic() - self._begin < PATIENCE_S:
            return
        if self._bar is None:
            self._clear_line()
            self._bar = self._make_bar()
            self._bar.start()
        if self._task is None:
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, completed=done, total=total, description=what)

    def _make_bar(self) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        amount: list[ProgressColumn] = (
            [DownloadColumn(), TransferSpeedColumn()] if self._unit == "bytes" else [MofNCompleteColumn()]
        )
        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *amount,
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True, no_color=not self._has_colour),
            transient=True,
        )
