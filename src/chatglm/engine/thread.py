"""EngineThread: the engine in a thread of its own, which the loop of a server never waits for.

Commands go in through a queue that is read before each step; news come out through one call a step. When a step
raises, every live request ends with an error and the engine is built again, at most three times in ten minutes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from .serving import ServingEngine
from .serving_state import StreamEvent
from .stream import Group

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_RESTARTS, RESTART_WINDOW_S = 3, 600.0
HANG_S = 120.0
"""A step that takes longer is taken for lost."""

HEARTBEAT_S = 10.0

Deliver = Callable[[list[StreamEvent]], None]


class Build(Protocol):
    """Makes an engine."""

    def __call__(self, *, keep_memory: bool = True) -> ServingEngine:
        """`keep_memory`: use the cache of the engine before; not where something may still write into it."""
        ...


class EngineThread:
    """Runs the engine that `build` makes. `deliver` gets the news, in the engine's thread; it must not block.

    on_failure  called with the groups that were alive when the engine failed, from whichever thread noticed
    """

    def __init__(
        self,
        build: Build,
        deliver: Deliver,
        on_failure: Callable[[list[Group]], None],
        *,
        max_waiting: int = 256,
    ) -> None:
        self._build = build
        self._deliver = deliver
        self._on_failure = on_failure
        self.max_waiting = max_waiting
        self._commands: queue.SimpleQueue[Callable[[ServingEngine], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._live: dict[str, Group] = {}
        self._restarts: deque[float] = deque()
        self._beat = time.monotonic()
        self._step_began: float | None = None
        self._generation = 0
        self.num_restarts = 0
        self.is_broken = False
        self.is_ready = False
        self.engine = build()
        self._thread: threading.Thread | None = None

    # From any thread

    def start(self) -> None:
        """Begin to run."""
        self.is_ready = True
        thread = threading.Thread(target=self._run, args=(self._generation,), name="engine", daemon=True)
        thread.start()
        self._thread = thread  # not before it lives, or `watch` would take it for dead

    @property
    def num_waiting(self) -> int:
        """Requests that were accepted and not yet admitted."""
        with self._lock:
            return sum(group.admitted is None for group in self._live.values())

    @property
    def num_live(self) -> int:
        with self._lock:
            return len(self._live)

    @property
    def is_full(self) -> bool:
        return self.num_waiting >= self.max_waiting

    def submit(self, group: Group) -> bool:
        """Hand a request over; False when the queue is full. Raises RequestError for one that can never fit."""
        self.engine.check(group)
        with self._lock:
            if sum(other.admitted is None for other in self._live.values()) >= self.max_waiting:
                return False
            self._live[group.id] = group
        self._commands.put(lambda engine: engine.submit(group))
        return True

    def cancel(self, identity: str, code: str = "cancelled") -> None:
        """End a request before the next step. May be called again, and for requests that have ended."""
        self._commands.put(lambda engine: engine.cancel(identity, code))

    def cancel_all(self, code: str) -> None:
        """End everything that is alive."""
        with self._lock:
            identities = list(self._live)
        for identity in identities:
            self.cancel(identity, code)

    def call(self, job: Callable[[ServingEngine], T]) -> Future[T]:
        """Run a job in the engine's thread between two steps."""
        future: Future[T] = Future()

        def run(engine: ServingEngine) -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job(engine))
                except Exception as error:  # the caller's to handle
                    future.set_exception(error)

        self._commands.put(run)
        return future

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread after its step."""
        self._generation += 1
        self._commands.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether the thread lives and moves, or is in a step that may still end."""
        if self.is_broken or self._thread is None or not self._thread.is_alive():
            return False
        began = self._step_began
        now = time.monotonic()
        return now - self._beat < HEARTBEAT_S or (began is not None and now - began < HANG_S)

    def watch(self, hang_s: float = HANG_S) -> None:
        """Called now and then from outside: a thread that died or hangs is replaced."""
        thread, began = self._thread, self._step_began
        if thread is None or self.is_broken:
            return
        if not thread.is_alive():
            self._recover(self._generation, "the engine thread died")
        elif began is not None and time.monotonic() - began > hang_s:
            self._recover(self._generation, f"a step took more than {hang_s:g} s", is_over=False)

    # In the engine's thread

    def _run(self, generation: int) -> None:
        engine = self.engine
        try:
            while generation == self._generation:
                self._beat = time.monotonic()
                if not self._read_commands(engine):
                    return
                if engine.has_work:
                    self._step_began = time.monotonic()
                    events = engine.step()
                    self._step_began = None
                else:
                    events = engine.take_events()
                if generation != self._generation:
                    return
                self._give(events)
        except Exception:
            logger.exception("engine step failed")
            self._recover(generation, "a step failed")

    def _read_commands(self, engine: ServingEngine) -> bool:
        """Do what was asked. Without work, wait for something; False: stop."""
        try:
            command = self._commands.get_nowait() if engine.has_work else self._commands.get(timeout=1.0)
            while command is not None:
                command(engine)
                command = self._commands.get_nowait()
        except queue.Empty:
            engine.contexts.drop_old(time.monotonic())
            return True
        return False

    def _give(self, events: list[StreamEvent]) -> None:
        if not events:
            return
        with self._lock:
            for event in events:
                if event.group.state == "finished":
                    self._live.pop(event.group.id, None)
        self._deliver(events)

    def _recover(self, generation: int, reason: str, *, is_over: bool = True) -> None:
        """End all live requests with an error, build a new engine in a new thread; weights stay.

        is_over  the step that failed has ended; one that hangs may still write into its cache
        """
        with self._lock:
            if generation != self._generation:
                return
            self._generation += 1
            self.is_ready = False
            self._step_began = None
            failed, self._live = list(self._live.values()), {}
            self._commands = queue.SimpleQueue()
        self._on_failure(failed)
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > RESTART_WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= MAX_RESTARTS:
            self.is_broken = True
            logger.error("%s again: %d restarts in ten minutes, giving up", reason, MAX_RESTARTS)
            return
        self._restarts.append(now)
        self.num_restarts += 1
        logger.error("%s; the engine is built again (%d requests ended)", reason, len(failed))
        self._beat = time.monotonic()
        try:
            self.engine = self._build(keep_memory=is_over)
        except Exception:
            self.is_broken = True
            logger.exception("the engine cannot be built again")
            return
        self.start()


def run_to_end(engine: ServingEngine, groups: list[Group]) -> list[StreamEvent]:
    """For benchmarks and tests without a thread: all events until these groups have ended."""
    for group in groups:
        engine.check(group)
        engine.submit(group)
    events: list[StreamEvent] = []
    while engine.has_work:
        events += engine.step()
    return events
