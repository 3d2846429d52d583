"""The part of `verify` that reads every byte of the weights."""

from __future__ import annotations

import zipfile
from pathlib import Path

from .folder import Checkpoint
from .layout import EMBEDDING, HEAD
from .loading import untied
from .problem import FileError, Problem
from .reading import holds_same, read_tensor
from .tensor_file import Progress, broken

BLOCK = 8 << 20


def deep_problems(checkpoint: Checkpoint, progress: Progress | None = None) -> list[Problem]:
    """Damaged bytes by the checksums of the zip records, NaN and infinity by tensor, a tied head that differs."""
    problems: list[Problem] = []
    total, done = 2 * checkpoint.nbytes, 0
    for path in checkpoint.files:
        if path.suffix == ".bin":
            try:
                check_records(path)
            except FileError as error:
                problems.append(error.problem)
        done += sum(entry.nbytes for entry in checkpoint.tensors.values() if entry.file == path)
        if progress is not None:
            progress(done, total, f"checksums of {path.name}")
    for entry in checkpoint.tensors.values():
        try:
            read_tensor(entry)
        except FileError as error:
            problems.append(error.problem)
        done += entry.nbytes
        if progress is not None:
            progress(done, total, f"values of {entry.name}")
    if checkpoint.config.tied_head:
        for leaf in ("", "_scale"):
            head, table = (checkpoint.tensors.get(f"{name}{leaf}") for name in (HEAD, EMBEDDING))
            if head is not None and table is not None and not holds_same(head, table):
                problems.append(untied(head))
    return problems


def check_records(path: Path) -> None:
    """Compare the checksums of a torch zip file. Raises FileError naming the first record that differs."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.CRC == 0:  # torch can be told not to compute them
                    continue
                with archive.open(info) as record:
                    while record.read(BLOCK):
                        pass
    except zipfile.BadZipFile as error:
        raise broken(path, f"is damaged ({error})") from error
