"""One file over HTTP: resumed where it was interrupted, also by another process, and checked before it gets its name.

huggingface_hub 2 starts a file anew after an interruption, which with shards of 2 GB means never finishing on a poor
line.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import DownloadError

BLOCK = 1 << 20
TIMEOUT_S = 30
ATTEMPTS = 5
_BROKEN_LINE = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class RemoteFile:
    """A file on a hub: bytes, and the hash that the hub calls its etag (sha256 of large files, git's sha1 of small)."""

    name: str
    url: str
    size: int
    etag: str


Count = Callable[[int], None]
"""Called with a number of bytes that are there now (negative when some were given up)."""


def fetch(remote: RemoteFile, path: Path, *, token: str | None, count: Count, pause_s: float) -> None:
    """Download to `path`, which appears when it is complete; what an interruption leaves is gone on with.

    The token is sent to the hub only, never to where the hub redirects. Raises DownloadError when the line stays
    broken, the server refuses, or the bytes are not those that the hub announced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{remote.etag[:16]}.part")
    have = part.stat().st_size if part.exists() else 0
    count(have)
    for attempt in range(ATTEMPTS):
        try:
            have = _continue(remote, part, have, token, count)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500:
                raise _refused(remote, error) from error
            reason: Exception = error
        except _BROKEN_LINE as error:
            reason = error
        have = part.stat().st_size if part.exists() else 0
        if attempt < ATTEMPTS - 1:
            time.sleep(pause_s * 2**attempt)
    else:
        raise DownloadError(
            f"{remote.name} stopped at {have:,} of {remote.size:,} bytes: {reason}",
            cure="run the same command again; it goes on from there",
        ) from reason
    if not has_etag(part, remote.etag):
        part.unlink()
        count(-have)
        raise DownloadError(
            f"{remote.name} arrived damaged: its hash is not {remote.etag[:16]}…, which the hub announced",
            cure="run the same command again; if it stays so, use another mirror (HF_ENDPOINT)",
        )
    part.replace(path)


def _continue(remote: RemoteFile, part: Path, have: int, token: str | None, count: Count) -> int:
    """Append what is missing; returns the bytes that are there. Raises when the line breaks, with `part` kept."""
    if have > remote.size:
        part.unlink()
        count(-have)
        have = 0
    if have == remote.size and part.exists():
        return have
    request = urllib.request.Request(remote.url)
    if have:
        request.add_header("Range", f"bytes={have}-")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with part.open("ab") as file, urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        _claim(file, remote)
        if file.tell() != have:
            raise ConnectionError("the file changed meanwhile")
        if have and answer.status != 206:  # the server knows no ranges and sends the whole file
            file.truncate(0)
            count(-have)
            have = 0
        while block := answer.read(min(BLOCK, max(remote.size - have, 1))):
            file.write(block)
            have += len(block)
            count(len(block))
            if have > remote.size:
                break
    if have != remote.size:
        raise ConnectionError(f"the answer had {have:,} bytes")
    return have


def _claim(file: BinaryIO, remote: RemoteFile) -> None:
    """Let no second process append to the same file; the system lets go of it when this one ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DownloadError(
            f"{remote.name} is being downloaded by another process", cure="wait for it, then run the same command again"
        ) from error


def _refused(remote: RemoteFile, error: urllib.error.HTTPError) -> DownloadError:
    cure = "check the name and the revision"
    if error.code in (401, 403):
        cure = "log in (`hf auth login`) or give a token that may read this repository"
    return DownloadError(f"{remote.name}: the hub answers {error.code} {error.reason}", cure=cure)


def has_etag(path: Path, etag: str) -> bool:
    """Whether a file has the hash in an etag; True for an etag that is no hash, which nothing can be compared with."""
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", etag):
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)  # how git names contents
    else:
        return True
    with path.open("rb") as file:
        while block := file.read(8 * BLOCK):
            digest.update(block)
    return digest.hexdigest() == etag
