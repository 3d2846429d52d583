"""Weight files whose size is known before their values: filled tensor by tensor, in any order, across several runs.

Each file gets its header and its full length at once (the disk gives room only to what is written). A tensor counts as
written when its name stands in the journal, and it gets there after its bytes are on the disk: a run that is killed at
any moment loses what it wrote since the last `commit`, and nothing else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from .atomic import write_whole
from .folder import INDEX, SAFETENSORS
from .layout import cut
from .reading import read_tensor
from .saving import dump, raw_bytes, safetensors_head
from .tensor_file import ITEM_BYTES, TensorEntry

JOURNAL = "unfinished-tensors.json"

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype (torch's name) and shape by tensor name."""


class Filling:
    """The safetensors files of a checkpoint while they are being filled. Memory: the tensor that is being written."""

    def __init__(self, folder: Path, shapes: Shapes, max_shard_bytes: int) -> None:
        """`folder` may hold the files of an earlier run with the same arguments."""
        self.folder, self.shapes = folder, shapes
        sizes = sizes_of(shapes)
        self.total_bytes = sum(sizes.values())
        shards = cut(sizes.items(), max_shard_bytes)
        stem, suffix = SAFETENSORS.split(".")
        count = len(shards)
        self.files = [SAFETENSORS]
        if count > 1:
            self.files = [f"{stem}-{k + 1:05d}-of-{count:05d}.{suffix}" for k in range(count)]
        self._written: set[str] = set(_journal(folder))
        self._pending: list[str] = []
        self._places: dict[str, tuple[Path, int]] = {}
        for file, names in zip(self.files, shards, strict=True):
            head, starts = safetensors_head({name: shapes[name] for name in names})
            self._places |= {name: (folder / file, start) for name, start in starts.items()}
            self._make(folder / file, head, len(head) + sum(sizes[name] for name in names))

    def _make(self, path: Path, head: bytes, size: int) -> None:
        if path.exists() and path.stat().st_size == size:
            return
        self._written -= {name for name, (file, _) in self._places.items() if file == path}
        self._write_journal()  # before the file is there again, with nothing in it
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size)

    def holds(self, *names: str) -> bool:
        """Whether these tensors were written by this run or an earlier one."""
        return self._written.issuperset(names)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place."""
        dtype, shape = self.shapes[name]
        found = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        assert found == (dtype, shape), f"{name}: {found} for {dtype} {shape}"
        path, start = self._places[name]
        with path.open("r+b") as file:
            file.seek(start)
            file.write(raw_bytes(tensor))
        self._pending.append(name)

    def commit(self) -> None:
        """Put what was added onto the disk and into the journal."""
        for path in {self._places[name][0] for name in self._pending}:
            handle = os.open(path, os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self._written.update(self._pending)
        self._pending = []
        self._write_journal()

    def _write_journal(self) -> None:
        write_whole(self.folder / JOURNAL, json.dumps(sorted(self._written)).encode())

    def read(self, name: str) -> Tensor:
        """A tensor that was written."""
        path, start = self._places[name]
        dtype, shape = self.shapes[name]
        return read_tensor(TensorEntry(name, shape, dtype, path, start))

    def finish(self) -> None:
        """Write the index where there are several files. Raises CheckpointError if a tensor is not there."""
        self.commit()
        if missing := sorted(self.shapes.keys() - self._written):
            raise CheckpointError(f"{self.folder}: {missing[0]} (and {len(missing) - 1} more) was never written")
        if len(self.files) > 1:
            where = {name: path.name for name, (path, _) in self._places.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
            (self.folder / f"{SAFETENSORS}{INDEX}").write_bytes(dump(index))


def sizes_of(shapes: Shapes) -> dict[str, int]:
    """Bytes of each tensor."""
    return {name: math.prod(shape) * ITEM_BYTES[dtype] for name, (dtype, shape) in shapes.items()}


def _journal(folder: Path) -> list[str]:
    try:
        names: list[str] = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return names
