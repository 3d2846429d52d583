"""Codes of quantised weights used where the system's file cache holds them: nothing is copied, so loading is instant.

A mapping is private: writing to such a tensor never reaches the file. Checkpoints are written beside and renamed, so a
newer one leaves a mapped one alone; a file that is cut while it is mapped ends the process that reads there. Measured
on ext4 with large folios: kernels stream mapped codes as fast as huge anonymous pages.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .huge_pages import madvise
from .reading import torch_dtype
from .tensor_file import ITEM_BYTES, TensorEntry

SMALLEST_MAPPED = 1 << 20
"""Bytes of a tensor that is worth a mapping."""

MADV_WILLNEED, MADV_POPULATE_READ = 3, 22


class MappedFiles:
    """Maps each file once, for as long as one of its tensors lives."""

    def __init__(self) -> None:
        self._storages: dict[Path, Any] = {}

    def codes(self, entry: TensorEntry) -> Tensor | None:
        """The mapped tensor, its pages read in; None for one that is no large matrix of contiguous 8-bit codes."""
        is_code = entry.dtype in ("uint8", "int8") and len(entry.shape) == 2 and entry.strides is None
        if not is_code or entry.nbytes < SMALLEST_MAPPED:
            return None
        if entry.file not in self._storages:
            size = entry.file.stat().st_size
            self._storages[entry.file] = torch.UntypedStorage.from_file(str(entry.file), False, size)
        storage = self._storages[entry.file]
        dtype = torch_dtype(entry.dtype)
        start = entry.offset // ITEM_BYTES[entry.dtype]
        tensor = torch.empty(0, dtype=dtype).set_(storage, start, entry.shape, (entry.shape[1], 1))
        _read_in(tensor)
        mapped: Tensor = tensor
        return mapped


def _read_in(tensor: Tensor) -> None:
    """Bring the pages under a mapped tensor into memory now, in large reads, rather than one by one when used."""
    advise = madvise()
    if advise is None:
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.numel() - start
    if advise(start, length, MADV_POPULATE_READ):  # Linux before 5.14
        advise(start, length, MADV_WILLNEED)
