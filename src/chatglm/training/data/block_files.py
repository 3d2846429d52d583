"""Encoded blocks on disk: each written whole or not at all, so that an interrupted run goes on behind the last one."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .blocks import Block
from .encoding import Encoded
from .problems import Problem


def block_path(folder: Path, number: int) -> Path:
    """Where a block lies."""
    return folder / f"block-{number:06}.npz"


def block_identity(block: Block) -> str:
    """sha256 of what a block is made of: a changed corpus is read again."""
    place = f"{block.file}\n{block.form}\n{block.first_line}\n{block.lines}\n{block.is_continued}\n".encode()
    return hashlib.sha256(place + block.data).hexdigest()


@dataclass(frozen=True)
class BlockFacts:
    """All of an encoded block but its ids."""

    path: Path
    file: str
    identity: str
    source_names: list[str]
    problems: list[Problem]
    left_out: int
    dropped_rounds: int
    is_continued: bool
    records: int

    @classmethod
    def read(cls, path: Path) -> BlockFacts | None:
        """The facts of a block file; None where there is none, or a damaged one."""
        try:
            with path.open("rb") as raw, np.load(raw) as file:
                found: dict[str, Any] = json.loads(file["facts"].tobytes())
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            return None
        found["problems"] = [Problem(**problem) for problem in found["problems"]]
        return cls(path=path, **found)


def write_block(folder: Path, block: Block, encoded: Encoded) -> BlockFacts:
    """Write beside, then rename."""
    path = block_path(folder, block.number)
    facts = {
        "file": block.file,
        "identity": block_identity(block),
        "source_names": encoded.source_names,
        "problems": [problem.as_dict() for problem in encoded.problems],
        "left_out": encoded.left_out,
        "dropped_rounds": encoded.dropped_rounds,
        "is_continued": encoded.is_continued,
        "records": len(encoded.samples),
    }
    written = path.with_suffix(".tmp")
    with written.open("wb") as file:
        as_bytes = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
        np.savez(file, facts=as_bytes, **encoded.arrays())  # type: ignore[arg-type]
    os.replace(written, path)
    return BlockFacts(path=path, **{**facts, "problems": encoded.problems})  # type: ignore[arg-type]


def read_arrays(path: Path, *names: str) -> Iterator[np.ndarray]:
    """Arrays of a block file, in the order of `names`; the zip's own checksums are verified."""
    with np.load(path) as file:
        for name in names:
            yield file[name]
