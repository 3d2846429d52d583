"""ServingEngine: many requests over one model, one step at a time.

Requests join and leave at every step. A step is either one slice of a first pass or one decode step, so no long prompt
holds up running answers, and no batch holds up a short prompt. Cache blocks are taken as tokens come; when none is
left, kept contexts go first and then the request whose loss costs least, which later resumes with the same tokens.
A first pass that runs out of memory is tried once more, alone and with all kept contexts gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import RequestError
from .block_pool import blocks_for
from .context_cache import Context
from .kv_cache import BLOCK_SIZE
from .runner import Prefill, Runner
from .serving_sampler import ServingSampler
from .serving_state import EngineLimits, Flight, Pending, StreamEvent
from .stream import Group, Stream
from .stream_keeper import ADMITTED, StreamKeeper

AGED_S = 2.0
"""A first pass that has waited so long is not overtaken any more, nor a request at the head of its queue."""

DEFAULT_BUDGET = 1 << 20

MAX_PREFILLS = 8
"""First passes that may be under way at once; each holds the hidden states of its context."""


class ServingEngine(StreamKeeper):
    """Used by one thread. `submit` and `cancel` between steps; `step` gives the news."""

    def __init__(
        self,
        runner: Runner,
        sampler: ServingSampler,
        limits: EngineLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        change_logits: Callable[[Tensor, list[Stream]], Tensor] | None = None,
        adapters: Mapping[str, Runner] | None = None,
    ) -> None:
        """change_logits: a fault to be injected into every pass; adapters: runners over the same cache, by name."""
        super().__init__(runner, sampler, limits or EngineLimits(), clock, change_logits)
        self.runners: dict[str | None, Runner] = {None: runner}
        for name, beside in (adapters or {}).items():
            self.runners[name] = beside
        self.prefill_budget = self.limits.prefill_budget or DEFAULT_BUDGET
        self._was_prefill = False
        self._flight: Flight | None = None
        self.launches_early = runner.model.device.type == "cuda"

    # From outside

    def check(self, group: Group) -> None:
        """Raise RequestError when the whole pool could not hold this request, or its adapter is not here."""
        if group.adapter not in self.runners:
            raise RequestError(f"there is no adapter {group.adapter!r}")
        front = group.front = self.runners[group.adapter].prefix_length
        first, n = group.streams[0], len(group.streams)
        most = max(
            blocks_for(front + group.num_prompt_tokens) + n,
            n * blocks_for(front + group.num_prompt_tokens + first.max_new),
        )
        if most > self.pool.num_blocks:
            raise RequestError(
                f"the request may need {most * BLOCK_SIZE:,} cache tokens (prompt {group.num_prompt_tokens:,}, "
                f"answer {first.max_new:,}, n {n}), the KV cache holds {self.pool.num_blocks * BLOCK_SIZE:,}",
                cure="ask for fewer tokens or choices, or start the server with a larger --kv-memory",
            )

    def submit(self, group: Group) -> None:
        """Queue a request that `check` let pass."""
        group.front = self.runners[group.adapter].prefix_length
        self.groups[group.id] = group
        self._owners |= dict.fromkeys(group.streams, group)
        self.waiting.push(group)

    def cancel(self, identity: str, code: str = "cancelled") -> None:
        """End a request; no token of it is computed from now on. Unknown and ended requests are left alone."""
        group = self.groups.get(identity)
        if group is not None:
            self._end_group(group, "cancelled", code)

    def begin_pass(self, streams: list[Stream]) -> Prefill:
        """A first pass of one adapter's streams, which `advance` runs slice by slice."""
        return self.runners[self._owners[streams[0]].adapter].begin(list(streams))

    # A step

    def step(self) -> list[StreamEvent]:
        """One slice of a first pass or one decode step, in turns where both wait; on a device that works by itself the
        slice is prepared while the step runs.
        """
        now = self._clock()
        self.counters.steps += 1
        self._drop_late(now)
        self.contexts.drop_old(now)
        self._admit(now)
        if self.launches_early and self.pending and self.running:
            self._decode(beside=lambda: self._advance(now))
        elif self.pending and not (self._was_prefill and self.running):
            self._was_prefill = True
            self._advance(now)
        elif self.running:
            self._was_prefill = False
            self._decode()
        return self.take_events()

    def _drop_late(self, now: float) -> None:
        for group in list(self.groups.values()):
            if now - group.arrived > self.limits.request_timeout_s:
                self._end_group(group, "timeout", "request_timeout")
            elif group.admitted is None and now - group.arrived > self.limits.queue_timeout_s:
                self._end_group(group, "error", "queue_timeout")

    # Admission

    def _admit(self, now: float) -> None:
        """Start what fits: the fairest key first; an aged head that does not fit yet is waited for."""
        while len(self.waiting) and len(self.pending) < MAX_PREFILLS:
            started = False
            for group in self.waiting.heads():
                if self._start(group, now):
                    started = True
                    break
                if now - group.arrived > AGED_S:
                    break
            if not started:
                return

    def _start(self, group: Group, now: float) -> bool:
        """Admit one group if there is room; its pass begins, or its context is already there."""
        live = group.live
        admitted = sum(len(other.live) for other in self.groups.values() if other.state in ADMITTED)
        if admitted and admitted + len(live) > self.limits.max_running:
            return False
        context = self.contexts.find(group, now) if group.is_fresh else None
        swapped, spares = group.swapped, len(live)
        if swapped is not None:
            wanted = [swapped.num_blocks]
        elif group.is_fresh:
            wanted = [0 if context else blocks_for(group.front + group.num_prompt_tokens)]
        else:
            wanted = [blocks_for(group.front + stream.num_tokens) for stream in live]
        if not group.is_fresh:  # never more than it can come to need, which `check` has found to fit
            spares = min(spares, group.most_blocks - sum(wanted))
        blocks = self._take_blocks(sum(wanted) + spares)
        if blocks is None:
            return False
        self.waiting.remove(group)
        self._note_admission(group, now, is_computed=context is None and swapped is None)
        group.spare, blocks = blocks[sum(wanted) :], blocks[: sum(wanted)]
        if swapped is not None:
            group.state, group.swapped = "running", None
            swapped.restore(self.pool, blocks)
            self.running += live
            return True
        if context is not None:
            self._note_hit(group)
            group.state = "running"
            self._fork(group, context, context.logits)
            return True
        group.state = "prefilling"
        filled = live[:1] if group.is_fresh else live
        for stream, count in zip(filled, wanted, strict=True):
            stream.hold(blocks[:count])
            blocks = blocks[count:]
        self._join_pending(group, filled, now)
        return True

    def _join_pending(self, group: Group, streams: list[Stream], now: float) -> None:
        """Short contexts of one adapter that wait together run as one pass, if that still is a single slice."""
        tokens = sum(stream.num_tokens for stream in streams)
        layers = self.runner.model.config.num_layers
        runs_alone = self.limits.deterministic or group.retried
        for held in [] if runs_alone else self.pending:
            is_open = held.prefill is None and not any(other.retried for other in held.groups)
            is_open &= held.groups[0].adapter == group.adapter
            if is_open and held.work_left(layers) + tokens * layers <= self.prefill_budget:
                held.streams.extend(streams)
                held.groups.append(group)
                return
        self.pending.append(Pending(list(streams), [group], now))

    def _note_admission(self, group: Group, now: float, *, is_computed: bool) -> None:
        if group.admitted is None:
            group.admitted = now
            self.counters.prompt_tokens += group.num_prompt_tokens
        if is_computed:
            self.waiting.charge(group.key, group.num_prompt_tokens)

    def _note_hit(self, group: Group) -> None:
        self.counters.context_hits += 1
        group.cached_tokens = group.num_prompt_tokens

    # First passes

    def _advance(self, now: float) -> None:
        """One slice of the pass with the least work left, or of the oldest once it has waited long enough."""
        oldest = min(self.pending, key=lambda held: held.since)
        is_aged = now - oldest.since > AGED_S
        layers = self.runner.model.config.num_layers
        held = oldest if is_aged else min(self.pending, key=lambda held: held.work_left(layers))
        before = held.work_left(layers)
        try:
            held.prefill = held.prefill or self.begin_pass(held.streams)
            logits = held.prefill.advance(self.prefill_budget)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._try_alone(held)
            return
        self.counters.iteration_tokens.observe((before - held.prefill.work_left) / layers)
        if logits is not None:
            self._pass_is_over(held, logits, now)

    def _try_alone(self, held: Pending) -> None:
        """A pass ran out of memory: give up what can be, and run each request of it alone; the second time it ends."""
        self.counters.out_of_memory += 1
        self.pending.remove(held)
        held.prefill = None
        self.contexts.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for group in held.groups:
            if group.retried:
                self._end_group(group, "error", "overloaded")
            else:
                group.retried = True
                streams = [stream for stream in held.streams if self._owners[stream] is group]
                self.pending.append(Pending(streams, [group], held.since))

    def _pass_is_over(self, held: Pending, logits: Tensor, now: float) -> None:
        """Its streams go on to decode steps, with their first token from these logits."""
        self.pending.remove(held)
        for group in held.groups:
            group.state = "running"
        resumed: list[Stream] = []
        rows: list[int] = []
        for row, stream in enumerate(held.streams):
            group = self._owners[stream]
            if group.is_fresh:
                context = Context(stream.blocks, group.front + group.num_prompt_tokens, logits[row].clone(), now)
                if self.contexts.is_on:
                    self.contexts.put(group, context)
                else:
                    self.pool.share(context.blocks)
                self._fork(group, context, logits[row])
                if not self.contexts.is_on:
                    self.pool.release(context.blocks)
            else:
                resumed.append(stream)
                rows.append(row)
        if resumed:
            self.running += resumed
            self._take(logits[rows], resumed)

    def _fork(self, group: Group, context: Context, logits: Tensor) -> None:
        """All choices go on from one context: whole blocks are shared, a begun one is copied."""
        whole = context.length // BLOCK_SIZE
        live = group.live
        for stream in live:
            self.pool.release(stream.blocks)
            stream.blocks = []
            self.pool.share(context.blocks[:whole])
            blocks = context.blocks[:whole]
            if whole < len(context.blocks):
                own = group.spare.pop()
                self.pool.copy(context.blocks[whole], own)
                blocks = [*blocks, own]
            stream.hold(blocks)
            stream.cached, stream.turn = context.length, self.counters.steps
        self.running += live
        self._take(logits.expand(len(live), -1), live)

    # Decode steps

    def _decode(self, beside: Callable[[], None] | None = None) -> None:
        """One token for the streams whose turn it is.

        On a device that works by itself the step after it begins before this one's tokens are made text and told, so
        that the device need not wait for that.
        """
        flight = self._flight or self._launch()
        self._flight = None
        taken = [] if flight is None else self._accept(flight.draws, flight.is_current)
        if flight is not None and self.launches_early and self._can_go_on():
            self._flight = self._launch()
        if beside is not None:
            beside()
        self._tell(taken)

    def _launch(self) -> Flight | None:
        """Start a step of the streams of one adapter that have waited longest; None where none can run."""
        turn = sorted((stream for stream in self.running if not stream.is_finished), key=lambda stream: stream.turn)
        if not turn:
            return None
        adapter = self._owners[turn[0]].adapter
        turn = [stream for stream in turn if self._owners[stream].adapter == adapter][: self.limits.decode_rows]
        batch: list[Stream] = []
        for stream in turn:
            if stream in self._owners and self._owners[stream].state == "running" and self._grow(stream):
                batch.append(stream)
        batch = [stream for stream in batch if stream.slots and not stream.is_finished]  # some may have been preempted
        if not batch:
            return None
        for stream in batch:
            stream.turn = self.counters.steps
        self.counters.iteration_tokens.observe(len(batch))
        draws = self._draw(self.runners[adapter].decode(list(batch)), batch)
        return Flight(draws, [stream.slots for stream in batch])

    def _can_go_on(self) -> bool:
        """Whether the next step needs neither text nor a block that somebody has to give up."""
        going_on = [stream for stream in self.running if not stream.is_finished]
        wanted = sum(stream.cached >= len(stream.slots) for stream in going_on)
        return wanted <= self.pool.num_free and all(stream.matcher is None for stream in going_on)

    def _grow(self, stream: Stream) -> bool:
        """A slot for the next token. False when the stream itself had to be preempted for want of one."""
        if stream.cached < len(stream.slots):
            return True
        group = self._owners[stream]
        if group.spare:
            stream.hold([*stream.blocks, group.spare.pop()])
            return True
        while (blocks := self._take_blocks(1)) is None:
            victim = self._victim()
            self._preempt(victim)
            if victim is group:
                return False
        stream.hold([*stream.blocks, *blocks])
        return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device (or the host's allocator) had no room."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in words or "out of memory" in words
