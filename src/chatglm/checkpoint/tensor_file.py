"""Which tensors a weight file holds and where their bytes lie, without reading them and without torch.

Both formats end as the same list: safetensors from its JSON header, a torch zip file through `torch_zip`. Reading a
tensor is then reading a range of a file. Nothing is mapped: the pages of a mapped file count as resident memory,
bytes read into their final place do not count twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .problem import PULL, FileError, Problem

Progress = Callable[[int, int, str], None]
"""(bytes done, bytes in all, what) while something long runs."""

ITEM_BYTES = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
"""Every dtype that a checkpoint may hold, by torch's name."""

SAFETENSORS_DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}

LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
LONGEST_POINTER = 1_024
LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # torch.save before 1.6


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: row-major from byte `offset` on, unless `strides` (in elements) say otherwise."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def span(self) -> int:
        """Elements from the first to the last one in the file."""
        if self.strides is None or self.elements == 0:
            return self.elements
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def from_row(self, row: int) -> TensorEntry:
        """The same tensor without its first `row` rows."""
        stride = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        offset = self.offset + row * stride * ITEM_BYTES[self.dtype]
        return replace(self, shape=(self.shape[0] - row, *self.shape[1:]), offset=offset)

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


def list_tensors(path: Path, expected_bytes: int | None = None) -> dict[str, TensorEntry]:
    """The tensors of one `.safetensors` or torch `.bin` file by name.

    expected_bytes  the size the whole file should have, where it is known; told when the file is too short
    Raises FileError for a missing or empty file, a Git-LFS pointer, a truncated or damaged one, a foreign format, and a
    pickle that would run code. Memory and time do not depend on the size of the tensors.
    """
    size, head = _size_and_head(path)
    if size == 0:
        raise broken(path, f"is empty (0{of_bytes(expected_bytes)} bytes)")
    pointer = lfs_pointer(head) if size < LONGEST_POINTER else None
    if pointer is not None:
        stands_for = f" ({pointer:,} bytes)" if pointer else ""
        what = f"is a Git-LFS pointer ({size} bytes), not weights{stands_for}"
        raise FileError(Problem(path.name, what, f"run `git lfs pull` in {path.parent}, or {PULL}"))
    if head.lstrip()[:1] == b"<":
        raise broken(path, f"is a web page ({size:,} bytes), not weights: the download was answered by a site")
    if path.suffix == ".safetensors":
        return _list_safetensors(path, size)
    if head.startswith(b"PK\x03\x04"):
        from .torch_zip import list_torch_zip

        return list_torch_zip(path, size, expected_bytes)
    if head.startswith(LEGACY_MAGIC):
        raise FileError(
            Problem(
                path.name,
                "is a torch file in the form from before 2020 (one pickle), which is not read",
                "load it once with an old torch and `torch.save` it again",
            )
        )
    raise broken(
        path, f"is no torch file: {size:,}{of_bytes(expected_bytes)} bytes that start with {head[:8].hex(' ')}"
    )


def _size_and_head(path: Path) -> tuple[int, bytes]:
    try:
        with path.open("rb") as file:
            return path.stat().st_size, file.read(512)
    except FileNotFoundError as error:
        raise broken(path, "is missing") from error
    except OSError as error:
        raise FileError(
            Problem(path.name, f"cannot be read ({error.strerror or error})", "check its permissions")
        ) from error


def lfs_pointer(head: bytes) -> int | None:
    """The size that a Git-LFS pointer text stands for, or None if the bytes are no pointer."""
    if not head.startswith(b"version https://git-lfs"):
        return None
    for line in head.splitlines():
        if line.startswith(b"size ") and line[5:].strip().isdigit():
            return int(line[5:])
    return 0


def of_bytes(expected: int | None) -> str:
    """` of N`, or nothing where N is not known."""
    return "" if expected is None else f" of {expected:,}"


def broken(path: Path, what: str, tensor: str = "") -> FileError:
    """A file that only another download repairs."""
    return FileError(Problem(path.name, what, f"download it again into {path.parent}: {PULL}", tensor))


def _list_safetensors(path: Path, size: int) -> dict[str, TensorEntry]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise broken(path, f"is no safetensors file: a header of {length:,} bytes is impossible")
        if 8 + length > size:
            raise broken(path, f"is truncated at {size:,} bytes, inside its header of {length:,}")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _safetensors_entry(path, name, 8 + length, item) for name, item in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise broken(path, f"has a damaged header ({error})") from error
    end = 8 + length + max((item["data_offsets"][1] for item in header.values()), default=0)
    if size != end:
        what = f"is truncated at {size:,} of {end:,} bytes" if size < end else f"has {size - end:,} bytes too many"
        cut = [str(entry) for entry in tensors.values() if entry.offset + entry.nbytes > size]
        raise broken(path, what, named(cut))
    return tensors


def _safetensors_entry(path: Path, name: str, start: int, item: dict[str, Any]) -> TensorEntry:
    shape = tuple(int(axis) for axis in item["shape"])
    dtype = SAFETENSORS_DTYPES.get(item["dtype"])
    if dtype is None:
        raise ValueError(f"{name} has the dtype {item['dtype']}")
    first, last = item["data_offsets"]
    entry = TensorEntry(name, shape, dtype, path, start + first)
    if first < 0 or last - first != entry.nbytes:
        raise ValueError(f"{name} {list(shape)} {dtype} takes {entry.nbytes} bytes, not {first} to {last}")
    return entry


def named(tensors: list[str]) -> str:
    """The first of several tensors and how many more."""
    if len(tensors) < 2:
        return "".join(tensors)
    return f"{tensors[0]} (and {len(tensors) - 1} more)"


def sizes_said(count: int) -> str:
    """`13.42 GB`, or the plain number where it is small."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,} bytes"
