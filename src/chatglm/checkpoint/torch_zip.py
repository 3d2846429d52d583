"""Torch's zip files read without torch: which tensors they hold, and where.

A `.bin` file is an uncompressed zip archive: `data.pkl` describes the tensors, `data/<key>` are their bytes. The
pickle is read by an unpickler that knows six names, none of which does anything but note its arguments; any other
name is refused, so a checkpoint cannot run code. That is the rule of `torch.load(weights_only=True)`, and it tells
the byte offsets as well.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .problem import FileError, Problem
from .tensor_file import ITEM_BYTES, TensorEntry, broken, of_bytes

LARGEST_PICKLE = 64 << 20  # that of ChatGLM-6B has some 10 kB
LOCAL_HEADER = struct.Struct("<4s5H3I2H")

STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
}


class _Storage(NamedTuple):
    dtype: str
    key: str
    elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageType(NamedTuple):
    dtype: str


class _ForeignName(pickle.UnpicklingError):
    """The pickle asks for something that is not part of a tensor."""


def _note_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    shape, strides = tuple(shape), tuple(strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor without storage or shape")
    if not all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides)):
        raise pickle.UnpicklingError("a tensor with impossible sizes")
    return _Tensor(storage, offset, shape, strides)


def _note_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


KNOWN_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _note_tensor,
    ("torch._utils", "_rebuild_parameter"): _note_parameter,
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()},
}


class _TensorUnpickler(pickle.Unpickler):
    """Builds dictionaries of `_Tensor`; nothing it can be asked for has an effect."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return KNOWN_NAMES[module, name]
        except KeyError:
            raise _ForeignName(f"{module}.{name}") from None

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage, key, _, elements = reference
        if kind != "storage" or not isinstance(storage, _StorageType) or not isinstance(elements, int):
            raise pickle.UnpicklingError(f"an unknown reference {kind!r}")
        return _Storage(storage.dtype, str(key), elements)


def list_torch_zip(path: Path, size: int, expected_bytes: int | None) -> dict[str, TensorEntry]:
    """The tensors of a torch zip file of `size` bytes. Raises FileError when it is cut, damaged or not only tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = {info.filename: info for info in archive.infolist()}
    except zipfile.BadZipFile as error:
        what = f"is truncated at {size:,}{of_bytes(expected_bytes)} bytes"
        if expected_bytes is None or size >= expected_bytes:
            what = f"is truncated or damaged: {size:,} bytes without the directory that ends a zip file"
        raise broken(path, what) from error
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1 or records[pickles[0]].file_size > LARGEST_PICKLE:
        raise broken(path, "is a zip file, but not one of torch: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    with path.open("rb") as file:
        byteorder = records.get(f"{root}byteorder")
        if byteorder is not None and _content(path, file, byteorder) != b"little":
            raise broken(path, "was written on a big-endian machine, which is not read")
        tensors = _unpickle(path, _content(path, file, records[pickles[0]]))
        return {name: _entry(path, file, size, records, root, name, tensor) for name, tensor in tensors.items()}


def _content(path: Path, file: io.BufferedReader, info: zipfile.ZipInfo) -> bytes:
    """A small record. Read by hand, since zipfile takes a checksum that torch was told to leave out for a wrong one."""
    start = _start(path, file, info, info.filename)
    file.seek(start)
    content = file.read(info.file_size)
    if len(content) != info.file_size or (info.CRC and zlib.crc32(content) != info.CRC):
        raise broken(path, f"is damaged: its record {info.filename} is not what was written")
    return content


def _start(path: Path, file: io.BufferedReader, info: zipfile.ZipInfo, name: str) -> int:
    """Where the bytes of a record begin: behind the record's own header."""
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER.size)
    if info.compress_type != zipfile.ZIP_STORED:
        raise broken(path, "is compressed, which torch never does", name)
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise broken(path, "is damaged: no record where its directory says", name)
    *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
    return int(info.header_offset + LOCAL_HEADER.size + name_length + extra_length)


def _unpickle(path: Path, described: bytes) -> Mapping[str, _Tensor]:
    try:
        found = _TensorUnpickler(io.BytesIO(described)).load()
    except _ForeignName as error:
        raise FileError(
            Problem(
                path.name,
                f"asks for `{error}`, which is code and no tensor; it was not run",
                "do not use this file; a checkpoint of ChatGLM holds tensors only",
            )
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way, but it can run nothing
        raise broken(path, f"has a damaged list of tensors ({type(error).__name__}: {error})") from error
    if not isinstance(found, Mapping):
        raise broken(path, f"holds a {type(found).__name__}, not named tensors")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise broken(path, f"holds {type(tensor).__name__} under {name!r}, not a tensor")
    return found


def _entry(
    path: Path,
    file: io.BufferedReader,
    size: int,
    records: Mapping[str, zipfile.ZipInfo],
    root: str,
    name: str,
    tensor: _Tensor,
) -> TensorEntry:
    """Where a tensor lies in the file."""
    info = records.get(f"{root}data/{tensor.storage.key}")
    if info is None:
        raise broken(path, "lacks the bytes of a tensor", name)
    start = _start(path, file, info, name)
    item = ITEM_BYTES[tensor.storage.dtype]
    strides = None if tensor.strides == _row_major(tensor.shape) else tensor.strides
    entry = TensorEntry(name, tensor.shape, tensor.storage.dtype, path, start + tensor.offset * item, strides)
    if (tensor.offset + entry.span) * item > info.file_size or start + info.file_size > size:
        raise broken(path, f"is damaged: a record of {info.file_size:,} bytes is too short for its tensor", str(entry))
    return entry


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for axis in reversed(shape):
        strides.append(step)
        step *= max(axis, 1)
    return tuple(reversed(strides))
