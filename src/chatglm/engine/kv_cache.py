"""KVCache: one pool of cache blocks for all sequences, allocated once.

A sequence owns slots (token places) that need not be neighbours; where they are, a read is a view and copies nothing.
Block 0 is scratch: padding is written there and read from there, so it stays finite. Memory never grows after
construction.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.huge_pages import prefer_huge_pages
from ..config import ModelConfig
from ..errors import DeviceError

BLOCK_SIZE = 16
"""Slots in a cache block."""


class KVCache:
    """Keys and values of every layer, each [num_layers, slots, heads, head_dim]."""

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_heads: int | None = None,
    ) -> None:
        """`capacity` is the number of tokens that the pool must hold (rounded up to whole blocks).

        num_heads  heads of this device where the model is split; all by default
        """
        self.num_blocks = -(-capacity // BLOCK_SIZE)
        shape = (config.num_layers, (self.num_blocks + 1) * BLOCK_SIZE, num_heads or config.num_heads, config.head_dim)
        try:
            self.keys = prefer_huge_pages(torch.empty(shape, dtype=dtype, device=device))
            self.values = prefer_huge_pages(torch.empty(shape, dtype=dtype, device=device))
        except RuntimeError as error:
            size = 2 * math.prod(shape) * dtype.itemsize
            raise DeviceError(
                f"no room on {device} for a KV cache of {capacity} tokens ({size / 1e9:.2f} GB)"
            ) from error
        self.keys[:, :BLOCK_SIZE].zero_()
        self.values[:, :BLOCK_SIZE].zero_()
        self.clear()

    def clear(self) -> None:
        """All blocks are free; nobody may use what was allocated before."""
        self._free = list(range(1, self.num_blocks + 1))  # sorted, so that neighbours are found

    @property
    def num_free_tokens(self) -> int:
        return len(self._free) * BLOCK_SIZE

    @property
    def num_bytes(self) -> int:
        """Of keys and values in all layers."""
        return 2 * self.keys.numel() * self.keys.element_size()

    @property
    def capacity(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_blocks * BLOCK_SIZE

    def allocate(self, tokens: int) -> list[int]:
        """Slots for `tokens` tokens, in whole blocks; neighbouring blocks when there is such a run.

        Raises DeviceError when the pool has too few free blocks.
        """
        count = -(-tokens // BLOCK_SIZE)
        if count > len(self._free):
            raise DeviceError(
                f"the KV cache has {self.num_free_tokens} free tokens of {self.capacity}, {tokens} are needed"
            )
        first = next(
            (i for i in range(len(self._free) - count + 1) if self._free[i + count - 1] - self._free[i] == count - 1), 0
        )
        blocks, self._free[first : first + count] = self._free[first : first + count], []
        return [block * BLOCK_SIZE + offset for block in blocks for offset in range(BLOCK_SIZE)]

    def release(self, slots: list[int]) -> None:
        """Give back what `allocate` returned."""
        for slot in slots[::BLOCK_SIZE]:
            bisect.insort(self._free, slot // BLOCK_SIZE)


@dataclass
class PrefillView:
    """The cache as the network sees it in a first pass: it writes, and looks only at what it just wrote.

    write_slots  int64 [batch, prefix + tokens]; padding goes to slot 0
    """

    cache: KVCache
    write_slots: Tensor
    length: int = 0

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [batch, heads, tokens, head_dim]; return the same."""
        slots = self.write_slots.flatten()
        self.cache.keys[layer, slots] = key.transpose(1, 2).flatten(0, 1).to(self.cache.keys.dtype)
        self.cache.values[layer, slots] = value.transpose(1, 2).flatten(0, 1).to(self.cache.values.dtype)
        return key, value


@dataclass
class DecodeView:
    """The cache in a decode step: new tokens (one a sequence, more where drafts are verified) look at all of their own.

    write_slots  int64 [batch, new]
    read_slots   int64 [batch, length], slot 0 where a sequence is shorter; or a slice of neighbouring slots (batch 1)
    """

    cache: KVCache
    write_slots: Tensor
    read_slots: Tensor | slice
    length: int

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [batch, heads, new, head_dim]; return [batch, heads, length, head_dim]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # [slots, heads, head_dim]
        keys[self.write_slots] = key.transpose(1, 2).to(keys.dtype)
        values[self.write_slots] = value.transpose(1, 2).to(values.dtype)
        read_keys, read_values = keys[self.read_slots], values[self.read_slots]
        if isinstance(self.read_slots, slice):
            read_keys, read_values = read_keys[None], read_values[None]
        return read_keys.transpose(1, 2).to(key.dtype), read_values.transpose(1, 2).to(value.dtype)
