"""Files, folders, archives and stdin as one sequence of named byte streams. Compressed ones are opened as they are.

`.gz`, `.xz`, `.bz2` and tar archives are read with the standard library, `.zst` with Python 3.14's or the `zstandard`
package. Nothing is unpacked to disk, and no more than a block of a stream is ever in memory.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

from chatglm.errors import MissingExtraError, TrainingError

Form = Literal["jsonl", "json", "text"]

_FORMS: dict[str, Form] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".txt": "text", ".md": "text"}
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_TARS = {".tgz": ".gz", ".txz": ".xz", ".tbz2": ".bz2", ".tzst": ".zst"}


@dataclass(frozen=True)
class Input:
    """One stream of a corpus.

    name       as shown in messages: path, or archive and member
    form       how records are told apart; None: by looking at the first bytes
    consumed   bytes of the file on disk that were read so far, for progress
    """

    name: str
    form: Form | None
    stream: IO[bytes]
    consumed: Callable[[], int]

    def read(self, size: int) -> bytes:
        """The next bytes. Raises TrainingError, naming the stream, where it is damaged."""
        with _reading(self.name):
            return self.stream.read(size)


def expand(paths: Sequence[str | Path]) -> list[str]:
    """Files of a list of files and folders (those with a known name, in order); `-` is stdin.

    Raises TrainingError for a path that does not exist and a folder without data.
    """
    files: list[str] = []
    for path in map(str, paths):
        if path == "-" or Path(path).is_file() or Path(path).is_fifo():
            files.append(path)
        elif Path(path).is_dir():
            inside = sorted(str(file) for file in Path(path).rglob("*") if file.is_file() and _is_known(file.name))
            if not inside:
                raise TrainingError(f"{path}: no data in this folder", cure=f"known names end in {', '.join(_FORMS)}")
            files += inside
        else:
            raise TrainingError(f"{path}: no such file or folder")
    return files


def total_bytes(files: Sequence[str]) -> int:
    """Size of all files on disk; stdin counts nothing."""
    return sum(Path(file).stat().st_size for file in files if file != "-")


def open_inputs(files: Sequence[str], form: Form | None = None) -> Iterator[Input]:
    """Every stream of the files, one open at a time. Raises TrainingError for damaged archives, naming the file."""
    done = 0
    for file in files:
        with _reading(file):
            if file == "-":
                yield Input("stdin", form, sys.stdin.buffer, lambda done=done: done)  # type: ignore[misc]
                continue
            with Path(file).open("rb") as raw:

                def consumed(raw: IO[bytes] = raw, done: int = done) -> int:
                    return done + raw.tell()

                stem, stream = _decompressed(file, raw)
                if stem.endswith(".tar"):
                    yield from _members(file, stream, form, consumed)
                else:
                    yield Input(file, form or _form(stem), stream, consumed)
            done += Path(file).stat().st_size


@contextmanager
def _reading(file: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError) as error:
        raise TrainingError(
            f"{file} cannot be read to its end ({type(error).__name__}: {error})", cure="fetch or pack it again"
        ) from error


def _decompressed(file: str, raw: IO[bytes]) -> tuple[str, IO[bytes]]:
    """The name without its compression, and the stream behind it."""
    path = PurePosixPath(file)
    suffix = _TARS.get(path.suffix, path.suffix)
    stem = f"{path.stem}.tar" if path.suffix in _TARS else path.stem
    if suffix == ".gz":
        return stem, cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if suffix == ".xz":
        return stem, cast(IO[bytes], lzma.LZMAFile(raw))
    if suffix == ".bz2":
        return stem, cast(IO[bytes], bz2.BZ2File(raw))
    if suffix == ".zst":
        return stem, _zstandard(raw)
    return path.name, raw


def _zstandard(raw: IO[bytes]) -> IO[bytes]:
    try:
        standard: Any = importlib.import_module("compression.zstd")
        return cast(IO[bytes], standard.ZstdFile(raw))
    except ModuleNotFoundError:
        pass
    try:
        package: Any = importlib.import_module("zstandard")
    except ModuleNotFoundError as error:
        raise MissingExtraError("zstandard", extra="data", purpose="reading .zst files before Python 3.14") from error
    return cast(IO[bytes], io.BufferedReader(package.ZstdDecompressor().stream_reader(raw)))


def _members(file: str, stream: IO[bytes], form: Form | None, consumed: Callable[[], int]) -> Iterator[Input]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            inside = archive.extractfile(member) if member.isfile() and _is_known(member.name) else None
            if inside is not None:
                stem, content = _decompressed(member.name, inside)
                yield Input(f"{file}:{member.name}", form or _form(stem), content, consumed)


def _is_known(name: str) -> bool:
    path = PurePosixPath(name)
    if path.name.startswith("."):
        return False
    if path.suffix in _TARS:
        return True
    inner = PurePosixPath(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    return inner in _FORMS or inner == ".tar"


def _form(name: str) -> Form | None:
    return _FORMS.get(PurePosixPath(name).suffix)
