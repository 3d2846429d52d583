"""StreamKeeper: the requests in a serving engine, from their tokens to their end. Which run next is ServingEngine's.

Whatever happens to a choice, it ends once, gives its cache blocks back and is reported.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .block_pool import BlockPool
from .context_cache import ContextCache
from .fair_queue import FairQueue
from .runner import Runner
from .serving_sampler import Chosen, Draws, ServingSampler
from .serving_state import Counters, EngineLimits, Pending, StreamEvent
from .stream import Group, Stream
from .swapping import SwappedBlocks

ADMITTED = ("prefilling", "running")

Taken = tuple[Stream, Chosen]
"""A stream and its newest token."""


class StreamKeeper:
    """Groups by id, their choices that run or wait, and who owns which block."""

    def __init__(
        self,
        runner: Runner,
        sampler: ServingSampler,
        limits: EngineLimits,
        clock: Callable[[], float],
        change_logits: Callable[[Tensor, list[Stream]], Tensor] | None,
    ) -> None:
        self.runner = runner
        self.sampler = sampler
        self.limits = limits
        self.pool = BlockPool(runner.cache, limits.pool_blocks)
        self.contexts = ContextCache(self.pool, limits.context_cache_s)
        self.waiting = FairQueue()
        self.pending: list[Pending] = []
        self.running: list[Stream] = []
        self.groups: dict[str, Group] = {}
        self.counters = Counters()
        self._owners: dict[Stream, Group] = {}
        self._clock = clock
        self._change_logits = change_logits
        self._keeps_copies = limits.preempt == "swap" or limits.deterministic
        self._events: list[StreamEvent] = []

    @property
    def has_work(self) -> bool:
        return bool(self.groups)

    @property
    def num_running(self) -> int:
        """Requests past their admission."""
        return sum(group.state in ADMITTED for group in self.groups.values())

    @property
    def cache_usage(self) -> float:
        """Share of the pool's blocks that somebody owns."""
        return self.pool.num_used / self.pool.num_blocks

    @property
    def num_used_bytes(self) -> int:
        """Of the cache, in blocks that somebody owns."""
        return self.pool.num_used * self.pool.block_bytes

    @property
    def num_context_bytes(self) -> int:
        """Of the cache, in blocks of kept contexts."""
        return self.contexts.num_blocks * self.pool.block_bytes

    @property
    def num_swapped_bytes(self) -> int:
        """Host memory that preempted requests lie in."""
        return sum(group.swapped.num_bytes for group in list(self.groups.values()) if group.swapped is not None)

    def take_events(self) -> list[StreamEvent]:
        """News since the last call."""
        events, self._events = self._events, []
        return events

    # Tokens

    def _draw(self, logits: Tensor, streams: list[Stream]) -> Draws:
        """Begin to sample; nobody waits for the device yet."""
        if self._change_logits is not None:
            logits = self._change_logits(logits, streams)
        return self.sampler.start(logits, streams)

    def _take(self, logits: Tensor, streams: list[Stream]) -> None:
        """Sample, decode to text, report; ended streams leave."""
        self._tell(self._accept(self._draw(logits, streams)))

    def _accept(
        self, draws: Draws, is_current: Callable[[int, Stream], bool] = lambda row, stream: True
    ) -> list[Taken]:
        """Each stream's token becomes its newest; what ends by the token itself is marked.

        is_current  whether a row's stream still is what it was when the draw began
        """
        taken = []
        for row, (stream, chosen) in enumerate(zip(draws.streams, draws.wait(), strict=True)):
            if not is_current(row, stream):
                continue
            if chosen.error:
                stream.fail(chosen.error)
            else:
                stream.num_sampled += 1
                stream.append(chosen.token, self.sampler.end_id)
            taken.append((stream, chosen))
        return taken

    def _tell(self, taken: list[Taken]) -> None:
        """Text of the tokens, and its end where there is one; ended streams leave."""
        now = self._clock()
        for stream, chosen in taken:
            if stream not in self._owners:
                continue  # another choice of the request has ended it
            group = self._owners[stream]
            group.first_token = group.first_token or now
            if chosen.error:
                self._finish(stream, "", "error", chosen.error.partition(":")[0])
                continue
            self.counters.generation_tokens += 1
            if stream.newest is not None:
                self.counters.gaps.observe(max(0.0, now - stream.newest))
            stream.newest = now
            self.waiting.charge(group.key, 1)
            self._read(stream, chosen)

    def _read(self, stream: Stream, chosen: Chosen) -> None:
        assert stream.text is not None
        text = ""
        if chosen.token != self.sampler.end_id:
            if chosen.info:
                stream.infos.append(chosen.info)
            text = stream.text.push(chosen.token)
            if stream.text.is_stopped:
                stream.finish_reason = "stop"
            elif stream.matcher is not None and not self._follow_grammar(stream, chosen.token):
                return
        if stream.is_finished:
            text += stream.text.finish()
            if stream.text.is_stopped:
                stream.finish_reason = "stop"
            self._finish(stream, text, str(stream.finish_reason))
        elif text:
            self._report(stream, text)

    def _follow_grammar(self, stream: Stream, token: int) -> bool:
        """Whether the stream goes on after this token; a complete text ends it."""
        assert stream.matcher is not None
        try:
            stream.matcher.take(token)
        except ValueError as error:
            stream.fail(f"grammar: {error}")
            self._finish(stream, "", "error", "grammar")
            return False
        if stream.matcher.is_complete:
            stream.finish_reason = "stop"
        return True

    def _report(self, stream: Stream, text: str, finish: str | None = None, code: str | None = None) -> None:
        infos, stream.infos = stream.infos, []
        stream.is_over = finish is not None
        self._events.append(StreamEvent(self._owners[stream], stream, text, infos, finish, code))

    def _finish(self, stream: Stream, text: str, finish: str, code: str | None = None) -> None:
        self._report(stream, text, finish, code)
        self._release(stream)
        group = self._owners[stream]
        if all(other.is_over for other in group.streams):
            self._forget(group)
        elif finish == "error":
            self._end_group(group, "error", code or "internal_error")

    def _end_group(self, group: Group, finish: str, code: str) -> None:
        """A terminal state for every choice that is left."""
        group.end_code = code
        if group.state == "waiting":
            self.waiting.remove(group)
        for held in [held for held in self.pending if group in held.groups]:
            self._leave_pending(held, group)
        for stream in [stream for stream in group.streams if not stream.is_over]:
            stream.finish_reason = "error" if finish == "error" else "cancelled"
            self._report(stream, "", finish, code)
        self._forget(group)

    def _leave_pending(self, held: Pending, group: Group) -> None:
        self.pending.remove(held)
        held.groups.remove(group)
        held.streams = [stream for stream in held.streams if self._owners[stream] is not group]
        held.prefill = None  # a shared pass starts again without it
        if held.groups:
            self.pending.append(held)

    def _forget(self, group: Group) -> None:
        self._leave(group)
        group.state, group.finished, group.swapped = "finished", self._clock(), None
        del self.groups[group.id]
        for stream in group.streams:
            del self._owners[stream]

    # Blocks

    def _leave(self, group: Group) -> None:
        """Give back everything that a group holds on the device."""
        for stream in group.streams:
            self._release(stream)
        self.pool.release(group.spare)
        group.spare = []

    def _release(self, stream: Stream) -> None:
        self.pool.release(stream.blocks)
        stream.blocks, stream.slots, stream.cached = [], [], 0
        if stream in self.running:
            self.running.remove(stream)

    def _take_blocks(self, count: int) -> list[int] | None:
        """Free blocks; kept contexts are given up for them."""
        while (blocks := self.pool.allocate(count)) is None:
            if not self.contexts.drop_one():
                return None
        return blocks

    def _victim(self) -> Group:
        """The admitted group with the least work lost, the latest of equals; never the oldest."""
        admitted = [group for group in self.groups.values() if group.state in ADMITTED]
        oldest = min(admitted, key=lambda group: group.arrived)
        others = [group for group in admitted if group is not oldest] or [oldest]
        return min(others, key=lambda group: (group.num_computed, -group.arrived))

    def _preempt(self, group: Group) -> None:
        """Take all blocks; ids, text, seeds and grammars stay. The group waits at the head of its key's queue."""
        self.counters.preemptions += 1
        if self._keeps_copies and group.state == "running":
            group.swapped = SwappedBlocks.take(self.pool, group.live)
        self._leave(group)
        group.state = "waiting"
        self.waiting.push(group, at_head=True)
        for held in [held for held in self.pending if group in held.groups]:
            self._leave_pending(held, group)
