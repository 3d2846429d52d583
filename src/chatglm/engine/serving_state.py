"""What a serving engine is told and what it tells: limits, events, counters, first passes under way."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Literal

from .runner import Prefill
from .serving_sampler import Draws
from .stream import Group, Stream, TokenInfo

Preempt = Literal["recompute", "swap"]


@dataclass(frozen=True)
class EngineLimits:
    """Sizes and times of a serving engine; times in seconds.

    decode_rows     sequences of one decode step; the others have theirs in the next
    prefill_budget  tokens times layers of one slice of a first pass; None is measured at the start
    context_cache_s how long a finished context is kept; 0 keeps none
    preempt         what a request that lost its blocks does: run its context and answer again, or come back from a copy
                    in host memory, bit for bit
    deterministic   every step has one shape, whoever else runs; first passes run alone; preempt is `swap`
    pool_blocks     use only so many cache blocks (tests)
    """

    max_running: int = 64
    decode_rows: int = 64
    prefill_budget: int | None = None
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    context_cache_s: float = 60.0
    preempt: Preempt = "recompute"
    deterministic: bool = False
    pool_blocks: int | None = None


@dataclass(frozen=True)
class Flight:
    """A decode step that was started. slots: those of each stream then, which others have taken the place of since
    where the stream lost its blocks.
    """

    draws: Draws
    slots: list[list[int]]

    def is_current(self, row: int, stream: Stream) -> bool:
        """Whether a row's token is still wanted."""
        return stream.slots is self.slots[row] and not stream.is_finished


@dataclass(frozen=True)
class StreamEvent:
    """News of one choice: text that cannot change any more, the tokens behind it, and how it ended."""

    group: Group
    stream: Stream
    text: str
    infos: list[TokenInfo]
    finish: str | None = None
    code: str | None = None


@dataclass
class Tally:
    """How many values lay up to each bound, and their sum; `counts` has one more for those above."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


def _token_tally() -> Tally:
    return Tally((1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192))


def _gap_tally() -> Tally:
    return Tally((0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2.5, 5))


@dataclass
class Counters:
    """Since the engine was made.

    iteration_tokens  tokens of each step
    gaps              seconds between two tokens of one choice
    """

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    context_hits: int = 0
    out_of_memory: int = 0
    iteration_tokens: Tally = field(default_factory=_token_tally)
    gaps: Tally = field(default_factory=_gap_tally)


@dataclass(eq=False)
class Pending:
    """A first pass under way: which streams it fills, and whose."""

    streams: list[Stream]
    groups: list[Group]
    since: float
    prefill: Prefill | None = None

    def work_left(self, num_layers: int) -> int:
        """Tokens times layers."""
        if self.prefill is not None:
            return self.prefill.work_left
        return num_layers * sum(stream.num_tokens for stream in self.streams)
