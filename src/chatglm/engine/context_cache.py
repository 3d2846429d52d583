"""ContextCache: keys and values of whole contexts that ended, for the same request again (regenerate, n > 1).

In a prefix-LM a context may be shared only whole: every token of it sees every other, so a longer context with the
same beginning has other keys and values from the second layer on. The key is the complete context and its owner.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from .block_pool import BlockPool
from .stream import Group

ContextKey = tuple[str, str | None, int, tuple[int, ...]]


@dataclass
class Context:
    """A context that has been run.

    blocks  hold its keys and values and those of `<sop>`
    logits  fp32 [vocab], after `<sop>`
    """

    blocks: list[int]
    length: int
    logits: Tensor
    used: float


def context_key(group: Group) -> ContextKey:
    """Owner, adapter, mask and all ids: nobody can learn from timing what others asked."""
    first = group.streams[0]
    return group.key, group.adapter, first.mask_place, tuple(first.context_ids)


class ContextCache:
    """Least recently used contexts go first, when they are too old or when their blocks are needed."""

    def __init__(self, pool: BlockPool, keep_s: float) -> None:
        """keep_s: seconds that a context is kept after its last use; 0 keeps none."""
        self._pool = pool
        self._keep_s = keep_s
        self._held: OrderedDict[ContextKey, Context] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_blocks(self) -> int:
        """Blocks of all contexts; choices that run may own some of them too."""
        return sum(len(context.blocks) for context in list(self._held.values()))

    @property
    def is_on(self) -> bool:
        return self._keep_s > 0

    def find(self, group: Group, now: float) -> Context | None:
        key = context_key(group)
        context = self._held.get(key)
        if context is not None:
            context.used = now
            self._held.move_to_end(key)
        return context

    def put(self, group: Group, context: Context) -> None:
        """Keep a context; the cache becomes an owner of its blocks."""
        key = context_key(group)
        if key in self._held:
            self._pool.release(self._held.pop(key).blocks)
        self._pool.share(context.blocks)
        self._held[key] = context

    def drop_old(self, now: float) -> None:
        """Let go of what was not used for long."""
        while self._held and next(iter(self._held.values())).used + self._keep_s <= now:
            self.drop_one()

    def drop_one(self) -> bool:
        """Let go of the least recently used context; False when there is none."""
        if not self._held:
            return False
        _, context = self._held.popitem(last=False)
        self._pool.release(context.blocks)
        return True

    def clear(self) -> None:
        while self.drop_one():
            pass
