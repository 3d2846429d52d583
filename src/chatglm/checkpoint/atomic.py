"""A folder that appears whole or not at all: written beside its target, then renamed over it."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from ..tokenizer.model_file import TOKENIZER_FILE
from .folder import BIN, CONFIG, INDEX, QUANTIZATION_RECORD, SAFETENSORS, SHARD, TOKENIZER_CONFIG
from .tensor_file import sizes_said

REPLACED = {
    CONFIG,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    SAFETENSORS,
    BIN,
    f"{SAFETENSORS}{INDEX}",
    f"{BIN}{INDEX}",
    QUANTIZATION_RECORD,
}
"""Files of an old checkpoint that a new one takes the place of; everything else in the folder stays."""

JOB = "unfinished-job.txt"
"""In a folder that may be gone on with: which job it belongs to. Files named `unfinished-…` are not in the result."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def whole_folder(target: Path, needed_bytes: int, *, overwrite: bool = False, job: str | None = None) -> Iterator[Path]:
    """A new folder to write into; it becomes `target` at the end of the block, or vanishes with an error.

    needed_bytes  what will be written; compared with the free disk space first
    overwrite     replace the checkpoint in `target`; its other files are kept
    job           says exactly what is being made: the folder stays after an error or a kill, and is given out again,
                  with what is in it, to the next run with the same job (to another one it is given empty)
    A process that is killed leaves either the old folder or the new one (and a hidden `.NAME.saving` beside it, which
    the next save removes). Raises CheckpointError when the disk is too small, or the target would lose something.
    """
    target = Path(os.path.abspath(target))
    _check_target(target, overwrite)
    temporary = target.with_name(f".{target.name}.{'saving' if job is None else 'unfinished'}")
    if job is None or not _belongs_to(temporary, job):
        shutil.rmtree(temporary, ignore_errors=True)
    _check_disk(target, needed_bytes - _allocated(temporary))
    temporary.mkdir(parents=True, exist_ok=True)
    if job is not None:
        (temporary / JOB).write_text(job, encoding="utf-8")
    is_done = False
    try:
        yield temporary
        for path in temporary.glob("unfinished-*"):
            path.unlink()
        _keep_other_files(target, temporary)
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        _commit(temporary, target)
        is_done = True
        _flush(target.parent)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(target.parent).free
        raise CheckpointError(
            f"the disk is full: {target} needs {sizes_said(needed_bytes)}, {sizes_said(free)} are free",
            cure="free some space, or save to another disk; nothing was changed",
        ) from error
    finally:
        if is_done or job is None:
            shutil.rmtree(temporary, ignore_errors=True)


def _belongs_to(folder: Path, job: str) -> bool:
    try:
        return (folder / JOB).read_text(encoding="utf-8") == job
    except OSError:
        return False


def _allocated(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk (a file that was only made long takes none)."""
    if not folder.is_dir():
        return 0
    return sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in folder.iterdir())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place, then rename it there."""
    temporary = path.with_name(f".{path.name}.saving")
    try:
        temporary.write_bytes(data)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; a checkpoint is a folder", cure="give another target")
    inside = list(target.iterdir())
    if any(path.name in REPLACED or SHARD.fullmatch(path.name) for path in inside) and not overwrite:
        raise CheckpointError(
            f"{target} holds a checkpoint already", cure="give another target, or ask to overwrite it"
        )
    if any(path.is_dir() for path in inside):
        raise CheckpointError(f"{target} holds folders, which replacing it would move", cure="give another target")


def _check_disk(target: Path, needed: int) -> None:
    place = next(folder for folder in (target, *target.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{target} needs {sizes_said(needed)}, but {sizes_said(free)} are free there",
            cure="free some space, or save to another disk",
        )


def _keep_other_files(target: Path, temporary: Path) -> None:
    """Files that are no part of a checkpoint go along, as second names of the same data where the disk can."""
    if not target.exists():
        return
    for path in target.iterdir():
        kept = temporary / path.name
        if path.name in REPLACED or SHARD.fullmatch(path.name) or kept.exists():
            continue
        try:
            os.link(path, kept)
        except OSError:
            shutil.copy2(path, kept)


def _commit(temporary: Path, target: Path) -> None:
    """Put `temporary` where `target` is; afterwards `temporary` is the old folder or nothing."""
    if not target.exists():
        os.rename(temporary, target)
        return
    if _exchange(temporary, target):
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step, or return False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE))
    return bool(done == 0)


def _flush(path: Path) -> None:
    """Make sure a file or folder is on the disk before anything is renamed."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
