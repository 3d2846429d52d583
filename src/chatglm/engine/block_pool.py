"""BlockPool: who owns which cache block. Sequences with the same context share its blocks by owner counts."""

from __future__ import annotations

from collections.abc import Iterable

from .kv_cache import BLOCK_SIZE, KVCache


def blocks_for(tokens: int) -> int:
    """Cache blocks that hold so many tokens."""
    return -(-tokens // BLOCK_SIZE)


def slots_of(blocks: Iterable[int]) -> list[int]:
    """The slots of blocks, in order."""
    return [block * BLOCK_SIZE + offset for block in blocks for offset in range(BLOCK_SIZE)]


class BlockPool:
    """Blocks of one KVCache with owner counts; a block is free again when its last owner lets go."""

    def __init__(self, cache: KVCache, limit: int | None = None) -> None:
        """limit: use only so many blocks of the cache (all by default)."""
        self.cache = cache
        self.num_blocks = cache.num_blocks if limit is None else min(limit, cache.num_blocks)
        self._owners: dict[int, int] = {}

    @property
    def block_bytes(self) -> int:
        """Keys and values of one block in all layers."""
        return self.cache.num_bytes // (self.cache.num_blocks + 1)

    @property
    def num_used(self) -> int:
        """Blocks with at least one owner."""
        return len(self._owners)

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self._owners)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one owner each, or None when there are not so many."""
        if count > self.num_free:
            return None
        blocks = [slot // BLOCK_SIZE for slot in self.cache.allocate(count * BLOCK_SIZE)[::BLOCK_SIZE]] if count else []
        self._owners |= dict.fromkeys(blocks, 1)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for each."""
        for block in blocks:
            self._owners[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One owner less for each."""
        for block in blocks:
            self._owners[block] -= 1
            if not self._owners[block]:
                del self._owners[block]
                self.cache.release([block * BLOCK_SIZE])

    def copy(self, source: int, target: int) -> None:
        """Keys and values of one block into another, in every layer."""
        for pool in (self.cache.keys, self.cache.values):
            pool[:, target * BLOCK_SIZE : (target + 1) * BLOCK_SIZE] = pool[
                :, source * BLOCK_SIZE : (source + 1) * BLOCK_SIZE
            ]
