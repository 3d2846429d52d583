"""A random order of any number of things that needs no memory: place → thing, for any place at once."""

from __future__ import annotations

import functools

import numpy as np

_ROUNDS = 6
_WORD = 0xFFFFFFFF


class Permutation:
    """A bijection of 0 … size - 1, drawn by `key`. A Feistel network over the next power of four, walked into range."""

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
        self._half = (1 << self._bits) - 1
        self._keys = [int(word) for word in np.random.SeedSequence(key).generate_state(_ROUNDS)]

    def __call__(self, place: int) -> int:
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} of {self.size}")
        found = self._step(place)
        while found >= self.size:  # at most three of four values lie outside, so few steps
            found = self._step(found)
        return found

    def _step(self, value: int) -> int:
        left, right = value >> self._bits, value & self._half
        for key in self._keys:
            left, right = right, left ^ (_mixed(right, key) & self._half)
        return left << self._bits | right


@functools.lru_cache(maxsize=64)
def permutation(size: int, seed: int, epoch: int) -> Permutation:
    """The order of `size` rows in an epoch."""
    return Permutation(size, seed, epoch)


def _mixed(value: int, key: int) -> int:
    """32 well-stirred bits (the finaliser of MurmurHash3)."""
    word = (value ^ (value >> 32) ^ key) & _WORD
    word = (word ^ (word >> 16)) * 0x85EBCA6B & _WORD
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & _WORD
    return word ^ (word >> 16)
