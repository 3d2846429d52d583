"""Preempted requests in host memory: their cache blocks are copied out and back, bit for bit (`--preempt swap`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .block_pool import BlockPool, slots_of
from .stream import Stream


@dataclass
class SwappedBlocks:
    """Keys and values of the blocks that a request's choices held; what choices share is held once.

    keys, values  on the host, [num_layers, blocks * BLOCK_SIZE, heads, head_dim]
    tables        for each choice, which of these blocks it held, in order
    cached        for each choice, tokens whose keys and values are there
    """

    keys: Tensor
    values: Tensor
    tables: dict[Stream, list[int]]
    cached: dict[Stream, int]
    num_blocks: int

    @classmethod
    def take(cls, pool: BlockPool, streams: list[Stream]) -> SwappedBlocks:
        """A copy of what `streams` hold; the blocks themselves stay theirs."""
        blocks = list(dict.fromkeys(block for stream in streams for block in stream.blocks))
        places = {block: place for place, block in enumerate(blocks)}
        slots = slots_of(blocks)
        keys, values = (held[:, slots].to("cpu") for held in (pool.cache.keys, pool.cache.values))
        tables = {stream: [places[block] for block in stream.blocks] for stream in streams}
        return cls(keys, values, tables, {stream: stream.cached for stream in streams}, len(blocks))

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def restore(self, pool: BlockPool, blocks: list[int]) -> None:
        """Back into `blocks` (as many as were copied, with one owner each); every choice holds its own again."""
        slots = slots_of(blocks)
        device = pool.cache.keys.device
        pool.cache.keys[:, slots] = self.keys.to(device)
        pool.cache.values[:, slots] = self.values.to(device)
        for stream, table in self.tables.items():
            held = [blocks[place] for place in table]
            pool.share(held)
            stream.hold(held)
            stream.cached = self.cached[stream]
        pool.release(blocks)  # the owner that `allocate` made
