"""Reading tensors: a range of a file straight into the tensor's own memory, one at a time, checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .huge_pages import prefer_huge_pages
from .problem import FileError, Problem
from .tensor_file import ITEM_BYTES, TensorEntry, broken

CHUNK_BYTES = 8 << 20
"""Read at once: small enough that a chunk is still in the cache when it is checked."""

EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}
"""Of each floating dtype: integers of its width, and the bits of its exponent."""

Count = Callable[[int], None]
"""Called with the number of bytes that were just read."""


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of a name in ITEM_BYTES."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def read_tensor(
    entry: TensorEntry, *, must_be_finite: bool = True, count: Count | None = None, into: Tensor | None = None
) -> Tensor:
    """The tensor on the CPU in its stored dtype, contiguous. Peak memory: the tensor.

    into  bytes (uint8, at least span · item size) that are read into, to be overwritten by the next reading
    Raises FileError naming file and tensor when the file ends too early or (must_be_finite) a value is NaN or infinite.
    """
    if into is None:
        flat = torch.empty(entry.span, dtype=torch_dtype(entry.dtype))
    else:
        flat = into[: entry.span * ITEM_BYTES[entry.dtype]].view(torch_dtype(entry.dtype))
    if (
        into is None and not flat.is_floating_point()
    ):  # codes stay where they are read to; floats may be cast to elsewhere
        prefer_huge_pages(flat)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        for chunk in flat.split(CHUNK_BYTES // ITEM_BYTES[entry.dtype]):
            _fill(chunk, file.readinto, entry)
            if must_be_finite and not is_finite(chunk):
                raise not_finite(entry)
            if count is not None:
                count(chunk.nbytes)
    if entry.strides is not None:
        flat = flat.as_strided(entry.shape, entry.strides).contiguous()
    return flat.view(entry.shape)


def read_chunks(entry: TensorEntry, elements: int) -> Iterator[Tensor]:
    """The values in row-major order, so many at a time; each chunk is overwritten by the next."""
    if entry.strides is not None:
        yield from read_tensor(entry, must_be_finite=False).flatten().split(elements)
        return
    buffer = torch.empty(min(elements, entry.elements), dtype=torch_dtype(entry.dtype))
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        for start in range(0, entry.elements, elements):
            chunk = buffer[: entry.elements - start]
            _fill(chunk, file.readinto, entry)
            yield chunk


def holds_same(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two stored tensors have equal shapes and values, whatever their dtypes. Peak memory: some 16 MB."""
    if first.shape != second.shape:
        return False
    step = min(CHUNK_BYTES // ITEM_BYTES[entry.dtype] for entry in (first, second))
    chunks = zip(read_chunks(first, step), read_chunks(second, step), strict=True)
    return all(
        torch.equal(one, other) if one.dtype == other.dtype else torch.equal(one.double(), other.double())
        for one, other in chunks
    )


def _fill(chunk: Tensor, readinto: Callable[[memoryview], int | None], entry: TensorEntry) -> None:
    view = chunk.view(torch.uint8).numpy().data
    filled = 0
    while filled < len(view):
        count = readinto(view[filled:])
        if not count:
            raise broken(entry.file, f"ended at {entry.file.stat().st_size:,} bytes while it was read", str(entry))
        filled += count


def is_finite(values: Tensor) -> bool:
    """Whether no value [elements] on the CPU is NaN or infinite; integers are finite.

    Those have all bits of the exponent set. Integer work in one thread: beside other programs, threads that wait for
    each other over so small a chunk made loading several times slower.
    """
    if values.dtype not in EXPONENTS or values.numel() == 0:
        return True
    integer, exponent = EXPONENTS[values.dtype]
    return bool((values.view(integer).numpy() & exponent).max() != exponent)


def not_finite(entry: TensorEntry) -> FileError:
    """The error for a tensor with a NaN or infinity."""
    return FileError(
        Problem(
            entry.file.name,
            "holds NaN or infinite values",
            "download the file again and compare its sha256; weights that were trained so cannot be repaired",
            str(entry),
        )
    )
