"""FairQueue: waiting requests, first come first served within a key, keys by the tokens they have had.

Source: virtual token counters, Sheng et al., "Fairness in serving large language models" (OSDI 2024): of the keys that
wait, the one that was served the fewest tokens is next. A key that was idle starts at the level of the others, so it
cannot save up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from .stream import Group


class FairQueue:
    """Waiting groups by key. `charge` tells what a key was served."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Group]] = {}
        self._served: dict[str, int] = {}
        self._level = 0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Group]:
        return (group for waiting in self._waiting.values() for group in waiting)

    def push(self, group: Group, *, at_head: bool = False) -> None:
        """Queue a group of its key; a preempted one goes to the head."""
        if group.key not in self._waiting:
            self._waiting[group.key] = deque()
            self._served[group.key] = max(self._served.get(group.key, 0), self._level)
        waiting = self._waiting[group.key]
        waiting.appendleft(group) if at_head else waiting.append(group)

    def heads(self) -> list[Group]:
        """The first of each key, the key that is next in front."""
        return [self._waiting[key][0] for key in sorted(self._waiting, key=lambda key: self._served[key])]

    def remove(self, group: Group) -> None:
        """Take out a group, wherever it stands in its key's queue."""
        waiting = self._waiting[group.key]
        waiting.remove(group)
        self._level = max(self._level, min(self._served[key] for key in self._waiting))
        if not waiting:
            del self._waiting[group.key]

    def charge(self, key: str, tokens: int) -> None:
        """These tokens were computed for this key."""
        self._served[key] = self._served.get(key, self._level) + tokens
        if len(self._served) > 10_000:  # keys by address come and go
            self._served = {name: served for name, served in self._served.items() if name in self._waiting}
