"""What a stage hands to the loop, and nothing more: a model, a loss, a stream of rows, and a few optional hooks.

The loop (loop.py) does the rest: processes, precision, accumulation, clipping, schedules, policies, checkpoints, logs.
A stage draws all its randomness from (seed, row number) or (seed, step), so that a resumed run repeats itself exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..model import GLM
from .loss import LossSum
from .samples import Batch, Sample, collate


@dataclass(frozen=True)
class MeteredLoss(LossSum):
    """A loss with further numbers to log: by name a sum and what it is divided by, added up over micro-batches and
    processes first. Every micro-batch must bring the same names.
    """

    metrics: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)


class Movable(Protocol):
    """A micro-batch: `Batch`, or a stage's own. `tokens` counts those that are no padding."""

    @property
    def tokens(self) -> int: ...

    def to(self, device: torch.device | str, /) -> Any: ...


class Source(Protocol):
    """Rows by number. `batch(start, count)` is a pure function: the run's place in its data is one number.

    rows_per_epoch  rows before the data begins again (in another order); None: endless
    """

    @property
    def rows_per_epoch(self) -> int | None: ...

    def batch(self, start: int, count: int) -> Movable:
        """Rows start … start + count - 1 as one micro-batch."""
        ...


Loss = Callable[[nn.Module, Any], LossSum]
"""(model, micro-batch on the device) → sum over its loss positions, with gradient, and their number."""


@dataclass
class Task:
    """One stage's part of a run.

    model          what is trained, with a GLM somewhere inside; only parameters with `requires_grad` are
    fill           gives values to a model on the meta device, once the processes have shared it out (filling.py)
    loss           called inside the loop's own forward, so that sharded parameters are whole there
    source         the rows
    held_out       rows that `evaluate.rows` are taken of, scored by `loss`; None: none
    evaluate       further figures at each evaluation, by name; called on every process
    before_step    called with the number of the step that comes, on every process (roll-outs belong here)
    on_checkpoint  may write more files into a checkpoint folder that is being made (process 0 only)
    on_resume      reads them again (every process)
    exported       what becomes `OUT/model`, if not the GLM in `model`; called on every process
    stops          asked at the start and after every step: why the run should end here as if it were done, or None
    """

    model: nn.Module
    loss: Loss
    source: Source
    held_out: Source | None = None
    evaluate: Callable[[], Mapping[str, float]] | None = None
    before_step: Callable[[int], None] | None = None
    on_checkpoint: Callable[[Path], None] | None = None
    on_resume: Callable[[Path], None] | None = None
    exported: Callable[[Path], object] | None = None
    stops: Callable[[], str | None] | None = None
    fill: Callable[[nn.Module], None] | None = None

    @property
    def glm(self) -> GLM:
        """The (first) GLM inside the model."""
        return next(module for module in self.model.modules() if isinstance(module, GLM))


class Stream(Protocol):
    """Packed rows of samples by number: what training data is."""

    @property
    def length(self) -> int: ...

    @property
    def rows_per_epoch(self) -> int: ...

    def row(self, index: int) -> list[Sample]: ...


@dataclass(frozen=True)
class StreamSource:
    """A stream as a `Source` of collated batches. first: rows of the stream to leave out (held-out rows lie there)."""

    stream: Stream
    first: int = 0

    @property
    def rows_per_epoch(self) -> int:
        return max(1, self.stream.rows_per_epoch - self.first)

    def batch(self, start: int, count: int) -> Batch:
        rows = [self.stream.row(self.first + start + i) for i in range(count)]
        return collate(rows, self.stream.length)


@dataclass(frozen=True)
class ListSource:
    """Rows that are all in memory, over and over in the same order."""

    rows: Sequence[Sequence[Sample]]
    length: int | None = None

    @property
    def rows_per_epoch(self) -> int:
        return len(self.rows)

    def batch(self, start: int, count: int) -> Batch:
        picked = [self.rows[(start + i) % len(self.rows)] for i in range(count)]
        return collate(picked, self.length)
