"""Run `chatglm` as a user does: with pipes, or at a pseudo-terminal."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = (sys.executable, "-m", "chatglm.cli")
TIMEOUT_S = 120
_ESCAPE = re.compile(r"\x1b(\[[0-9;?=>]*[ -/]*[@-~]|\][^\x07]*\x07|[()][A-Z0-9]|[=>78])")


def environment(**more: str) -> dict[str, str]:
    """The user's own, without what would change the program's looks; two threads; no network."""
    dropped = {"NO_COLOR", "LC_ALL", "LC_MESSAGES", "LANG", "LANGUAGE", "COLUMNS", "LINES", "FORCE_COLOR"}
    own = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**own, "LANG": "C.UTF-8", "TERM": "xterm", "HF_HUB_OFFLINE": "1", "PROMPT_TOOLKIT_NO_CPR": "1", **more}


def run(
    *words: str | Path,
    stdin: str | bytes = b"",
    program: tuple[str, ...] = PROGRAM,
    cwd: Path | None = None,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """The finished process with stdout and stderr as text."""
    done = subprocess.run(
        [*program, *map(str, words)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        env=environment(**env),
        cwd=cwd,
        timeout=TIMEOUT_S,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


class AtTerminal:
    """A program with a pseudo-terminal as all its streams; leave the `with` block and it is killed if it still runs."""

    def __init__(self, *words: str | Path, program: tuple[str, ...] = PROGRAM, **env: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OWN_TERMINAL, *program, *map(str, words)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(**env),
            start_new_session=True,
        )
        os.close(slave)
        self.raw = b""
        self.screen = ""
        self._seen = 0

    def __enter__(self) -> AtTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str) -> str:
        """Wait until `text` appears after what was waited for before; what appeared up to and with it."""
        deadline = time.monotonic() + TIMEOUT_S
        while (place := self.screen.find(text, self._seen)) < 0:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{text!r} did not appear; the rest of the screen: {self.screen[self._seen :]!r}")
        end = place + len(text)
        shown, self._seen = self.screen[self._seen : end], end
        return shown

    def wait_for_match(self, pattern: str) -> str:
        """As `wait_for`, for a regular expression."""
        deadline = time.monotonic() + TIMEOUT_S
        while (found := re.compile(pattern).search(self.screen, self._seen)) is None:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"nothing like {pattern!r}; the rest of the screen: {self.screen[self._seen :]!r}")
        shown, self._seen = self.screen[self._seen : found.end()], found.end()
        return shown

    def wait_for_exit(self) -> int:
        """The exit code once the program has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(1.0, deadline - time.monotonic()))

    def wait_until_asleep(self) -> None:
        """Wait until the main thread waits for something, as far as the system tells."""
        state = Path(f"/proc/{self.process.pid}/stat")
        deadline = time.monotonic() + TIMEOUT_S
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < deadline, "the program never waits"

    def rest(self) -> str:
        """What appeared since the last wait."""
        return self.screen[self._seen :]

    def _read(self, timeout: float) -> bool:
        if timeout <= 0 or not select.select([self._master], [], [], timeout)[0]:
            return False
        try:
            raw = os.read(self._master, 65_536)
        except OSError:  # the other side is closed
            return False
        self.raw += raw
        self.screen = _ESCAPE.sub("", self.raw.decode("utf-8", "replace")).replace("\r", "")
        return bool(raw)


_OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C on this terminal is for this session
os.execv(sys.argv[1], sys.argv[1:])
"""
