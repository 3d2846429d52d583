"""The rows of a step on their way in, and its sums on their way out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .loss import LossSum
from .sharding import World
from .task import Movable, Source


def share_of(rows: int, world: World, micro_rows: int) -> list[tuple[int, int]]:
    """(start, count) of this process's micro-batches within a global batch; as many on every process."""
    own = rows // world.data_size
    begin = own * world.data_rank
    return [(begin + start, min(micro_rows, own - start)) for start in range(0, own, micro_rows)]


class Collected:
    """Sums over micro-batches on the device, read once a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.names: list[str] = []

    def add(self, result: LossSum, tokens: int) -> None:
        """One micro-batch."""
        self._add("loss", result.total.detach())
        self._add("count", result.count)
        self._add("tokens", tokens)
        metrics: Mapping[str, tuple[Any, Any]] = getattr(result, "metrics", {})
        self.names = list(metrics)
        for name, (total, by) in metrics.items():
            self._add(f"{name}/sum", total)
            self._add(f"{name}/by", by)

    def _add(self, name: str, value: Tensor | float) -> None:
        number = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach()
        self.sums[name] = self.sums[name] + number if name in self.sums else number

    def summed(self, world: World) -> dict[str, Any]:
        """Over the processes, as numbers."""
        together = world.sum_over_data(torch.stack([value.reshape(()) for value in self.sums.values()]))
        return {**dict(zip(self.sums, together.tolist(), strict=True)), "names": self.names}


class Reader:
    """Reads the next step's rows while this step computes."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self.ready: dict[tuple[int, int], Future[Movable]] = {}

    def batches(self, source: Source, spans: list[tuple[int, int]]) -> Any:
        """The micro-batches of the spans (start, count), read ahead where they were expected."""
        for span in spans:
            waiting = self.ready.pop(span, None)
            yield waiting.result() if waiting is not None else source.batch(*span)

    def expect(self, source: Source, spans: list[tuple[int, int]]) -> None:
        """Begin to read, unless the source forbids it (`reads_ahead = False`)."""
        self.forget()
        if getattr(source, "reads_ahead", True):
            self.ready = {span: self.thread.submit(source.batch, *span) for span in spans}

    def forget(self) -> None:
        for waiting in self.ready.values():
            waiting.cancel()
        self.ready = {}

    def close(self) -> None:
        self.forget()
        self.thread.shutdown()


class Timer:
    """Seconds by part of a step, as the host sees them."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic()

    def mark(self, name: str) -> None:
        """What has gone by since the last mark belongs to `name`."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now
