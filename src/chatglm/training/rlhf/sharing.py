"""Work on a list of answers, shared by the processes of a run: each does a stretch of it, and all have the whole.

What is drawn depends on an answer's place in the whole list, never on who draws it, so one process and several make
the same round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed

from ...errors import TrainingError

Made = TypeVar("Made")


def own_stretch(count: int) -> range:
    """Which of `count` things this process works on; a stretch of neighbours, as long as any other's or one more."""
    size, rank = _processes()
    return range(rank * count // size, (rank + 1) * count // size)


def from_all(make: Callable[[], Made]) -> list[Made]:
    """What `make` gives on each process, in order of the processes, everywhere; a collective.

    A TrainingError of one process is raised on all of them, so that nobody waits for a process that gave up.
    """
    size, _ = _processes()
    if size == 1:
        return [make()]
    made: tuple[Made | None, TrainingError | None]
    try:
        made = make(), None
    except TrainingError as error:
        made = None, error
    found: list[Any] = [None] * size
    torch.distributed.all_gather_object(found, made)
    for _, failure in found:
        if failure is not None:
            raise failure
    return [value for value, _ in found]


def _processes() -> tuple[int, int]:
    """How many processes the run has, and which of them this one is."""
    if not torch.distributed.is_initialized():
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()
