"""Standard streams: which are terminals, colours, notes on stderr. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO


def prepare_streams() -> None:
    """Malformed input is replaced (U+FFFD), never an exception; so is what the output's encoding lacks."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = stream.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968")
            stream.reconfigure(encoding="utf-8" if is_ascii else stream.encoding, errors="replace")


@dataclass(frozen=True)
class Terminal:
    """What the three streams are, and how to write notes (stderr) that are no answers."""

    reads_keys: bool
    shows_answers: bool
    shows_notes: bool
    quiet: bool = False
    has_colour: bool = True

    @classmethod
    def detect(cls, *, quiet: bool = False, environ: Mapping[str, str] = os.environ) -> Terminal:
        """A dumb terminal counts as none for output; NO_COLOR takes the colours away."""
        is_dumb = environ.get("TERM") == "dumb"
        return cls(
            reads_keys=_is_terminal(sys.stdin),
            shows_answers=_is_terminal(sys.stdout) and not is_dumb,
            shows_notes=_is_terminal(sys.stderr) and not is_dumb,
            quiet=quiet,
            has_colour=not environ.get("NO_COLOR"),
        )

    def note(self, text: str) -> None:
        """A dim line on stderr, unless --quiet."""
        if not self.quiet:
            self._write(text, "2")

    def say(self, text: str) -> None:
        """A plain line on stderr, unless --quiet."""
        if not self.quiet:
            self._write(text, "")

    def reply(self, text: str) -> None:
        """A plain line on stderr, also with --quiet: what was asked for."""
        self._write(text, "")

    def complain(self, text: str) -> None:
        """A red line on stderr, also with --quiet."""
        self._write(text, "31")

    def _write(self, text: str, style: str) -> None:
        styled = style and self.shows_notes and self.has_colour
        sys.stderr.write(f"\x1b[{style}m{text}\x1b[0m\n" if styled else f"{text}\n")
        sys.stderr.flush()


@contextmanager
def silent_keyboard() -> Iterator[None]:
    """Keys that are typed inside are not echoed; they wait for the next prompt. Nothing happens without a terminal."""
    try:
        import termios

        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
    except (ImportError, OSError, ValueError, termios.error):
        yield
        return
    during = [*before]
    during[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSANOW, during)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421, 0x9B: 0xFFFD}


def visible(text: str) -> str:
    """Control characters as pictures (␛), so that no answer can steer the terminal."""
    return text.translate(_VISIBLE)
