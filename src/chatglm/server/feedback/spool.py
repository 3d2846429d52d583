"""A folder of feedback that waits to be sent on: one file for each, written beside its name and renamed.

What `put` has returned for is on the disk: a kill loses nothing of it. Several processes may put into one folder; the
one that holds its lock sends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import RequestError

MOST = 20_000
"""Files in a folder; beyond it nothing is taken."""

WAITING, REFUSED, UNFINISHED = ".json", ".refused", ".writing"


class SpoolFull(Exception):
    """As many wait as may, or the disk took no more."""


class Spool:
    """Raises RequestError when the folder cannot be made or written to."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise RequestError(
                f"{self.folder}: feedback cannot be kept there ({error.strerror})",
                cure="give --feedback-spool a folder that the server may write to",
            ) from error
        names = self.waiting()
        self._last = int(names[-1].name.split("-")[0]) if names else 0

    def put(self, item: dict[str, Any]) -> str:
        """Keep it; its name. Returns when it is on the disk. Raises SpoolFull."""
        if len(self.waiting()) >= MOST:
            raise SpoolFull(f"{MOST:,} opinions wait to be sent on already")
        self._last = max(time.time_ns(), self._last + 1)  # in the order of their coming, whatever the clock does
        path = self.folder / f"{self._last:020d}-{secrets.token_hex(8)}{WAITING}"
        beside = path.with_suffix(UNFINISHED)
        try:
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(item, file, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
            self._flush()
        except OSError as error:
            for left in (beside, path):
                left.unlink(missing_ok=True)
            raise SpoolFull(error.strerror or str(error)) from error
        return path.stem

    def waiting(self) -> list[Path]:
        """What is to be sent, the oldest first."""
        return sorted(path for path in self.folder.iterdir() if path.suffix == WAITING)

    def done(self, path: Path) -> None:
        """It has been taken where it was sent to."""
        path.unlink(missing_ok=True)

    def refuse(self, path: Path) -> Path:
        """It will never be taken: it stays under another name for a person to look at."""
        kept = path.with_suffix(REFUSED)
        path.rename(kept)
        return kept

    @contextlib.contextmanager
    def sending(self) -> Iterator[bool]:
        """Whether this process may send now; one at a time may."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        """What waits stays for the next start."""
        os.close(self._lock)

    def _flush(self) -> None:
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
