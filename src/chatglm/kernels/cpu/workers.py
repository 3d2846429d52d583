"""Threads that run programs of kernels together, and the native loop that they run.

A program is a list of operations: a kernel, its arguments, and the number of chunks that its work is cut into. All
threads walk through it; each takes chunks of the current operation from a shared counter until there are none, and goes
on when all are done. So a thread whose core is taken away delays the others by one chunk, not by its share. Waiting
threads spin for some microseconds, then sleep: a core that a waiting thread leaves goes to the one that it waits for.

Between programs the threads stay in native code, asleep, without Python's lock. Chunks are independent: results do not
depend on the number of threads or on who ran what.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from .emitter import I32, I64, POINTER, Function, Module, Value
from .jit import Compiler

log = logging.getLogger(__name__)

OPERATION_WORDS = 16
"""An operation takes two cache lines: what it is, and the counters that all threads write."""

KERNEL, ARGUMENTS, CHUNKS, NEXT, DONE = 0, 1, 2, 8, 9
"""Places of its 8-byte words. NEXT and DONE are counters of 32 bits."""

POOL = ("epoch", "open", "active", "sleeping", "stop", "program", "count", "syscall", "idle", "asleep", "parks")
"""Fields of the shared state, each on a cache line of its own. `parks`: idle threads go back to Python to sleep."""

LINE = 64
FUTEX = {"x86_64": 202, "aarch64": 98}
WAIT, WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE, private to this process

SPINS = 2_000
"""Turns of a waiting loop inside a program before the thread sleeps: some tens of microseconds."""

IDLE_SPINS = 4_000
"""The same between programs."""


@dataclass
class Operation:
    """One kernel over `chunks` chunks; `arguments` are its 8-byte fields, and may be changed between runs."""

    kernel: int
    arguments: numpy.ndarray[Any, numpy.dtype[numpy.int64]]
    chunks: int


class Program:
    """Operations in the form that the native loop reads. `keep` is held as long as the program lives."""

    def __init__(self, operations: Sequence[Operation], keep: object = None) -> None:
        self.operations = list(operations)
        self.keep = keep
        words = numpy.zeros(len(self.operations) * OPERATION_WORDS + LINE // 8, dtype=numpy.int64)
        start = -words.ctypes.data % LINE // 8
        self.words = words[start : start + len(self.operations) * OPERATION_WORDS].reshape(-1, OPERATION_WORDS)
        for row, operation in zip(self.words, self.operations, strict=True):
            row[KERNEL], row[ARGUMENTS] = operation.kernel, operation.arguments.ctypes.data
            row[CHUNKS] = operation.chunks
        self.address, self.count = self.words.ctypes.data, len(self.operations)

    def set_chunks(self, place: int, chunks: int) -> None:
        """Change into how many chunks an operation is cut, between two runs."""
        self.operations[place].chunks = chunks
        self.words[place, CHUNKS] = chunks


def emit_workers(module: Module) -> None:
    """The native functions `run` (the caller's part) and `serve` (the other threads' loop)."""
    _emit_walk(module)
    _emit_run(module)
    _emit_serve(module)


def _field(function: Function, pool: Value, name: str) -> Value:
    return function.at(pool, LINE * POOL.index(name))


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i686")


def _futex(function: Function, pool: Value, place: Value, operation: int, value: Value) -> None:
    """Sleep while the integer at `place` is `value`, or wake all who sleep there; without a system call: give way."""
    syscall = function.load(_field(function, pool, "syscall"), POINTER)
    number = function.constant(FUTEX.get(platform.machine().lower(), 0), I64)
    null = function.constant(0, I64)
    function.call_pointer(
        syscall, I64, number, place, function.constant(operation, I64), value.cast(I64), null, null, null
    )


def _emit_walk(module: Module) -> None:
    """walk(pool, program, count): take part in every operation of a program."""
    function = Function(module, "walk", [POINTER, POINTER, I64])
    pool, program, count = function.arguments
    with function.loop(count) as number:
        operation = function.at(program, number * (8 * OPERATION_WORDS))
        kernel = function.load(operation, POINTER, KERNEL)
        arguments = function.load(operation, POINTER, ARGUMENTS)
        chunks = function.load(operation, I64, CHUNKS).cast(I32)
        following, done = function.at(operation, 8 * NEXT), function.at(operation, 8 * DONE)
        with function.repeat() as leave_if:
            chunk = function.atomic_add(following, 1)
            leave_if(chunk.compare(">=", chunks))
            function.call_pointer(kernel, None, arguments, chunk.cast(I64))
            is_last = (function.atomic_add(done, 1) + 1).compare("==", chunks)
            with function.when(is_last):
                sleeping = function.atomic_load(_field(function, pool, "sleeping"))
                with function.when(sleeping.compare("!=", 0)):
                    _futex(function, pool, done, WAKE, function.constant(1 << 20, I32))
        _await(function, pool, done, chunks)
    function.close()


def _await(function: Function, pool: Value, place: Value, wanted: Value) -> None:
    """Wait until the integer at `place` is `wanted`: spin first, then sleep."""
    turns = function.reserve(I32)
    function.store(function.constant(0, I32), turns)
    with function.repeat() as leave_if:
        seen = function.atomic_load(place)
        leave_if(seen.compare("==", wanted))
        function.pause(_is_x86())
        turn = function.load(turns, I32) + 1
        function.store(turn, turns)
        with function.when(turn.compare(">", SPINS)):
            sleeping = _field(function, pool, "sleeping")
            function.atomic_add(sleeping, 1)
            _futex(function, pool, place, WAIT, seen)
            function.atomic_add(sleeping, -1)


def _emit_run(module: Module) -> None:
    """run(pool, program, count): open a program to the other threads, take part, and return when it is done."""
    function = Function(module, "run", [POINTER, POINTER, I64])
    pool, program, count = function.arguments
    with function.loop(count) as number:
        operation = function.at(program, number * (8 * OPERATION_WORDS))
        for counter in (NEXT, DONE):
            function.store(function.constant(0, I32), function.at(operation, 8 * counter))
    function.store(program, _field(function, pool, "program"))
    function.store(count, _field(function, pool, "count"))
    epoch = _field(function, pool, "epoch")
    number = function.atomic_load(epoch) + 1
    function.atomic_store(number, _field(function, pool, "open"))
    function.atomic_store(number, epoch)
    asleep = function.atomic_load(_field(function, pool, "asleep"))
    with function.when(asleep.compare("!=", 0)):
        _futex(function, pool, epoch, WAKE, function.constant(1 << 20, I32))
    function.call_own("walk", pool, program, count)
    function.atomic_store(0, _field(function, pool, "open"))
    active = _field(function, pool, "active")
    _await(function, pool, active, function.constant(0, I32))
    function.close()


def _emit_serve(module: Module) -> None:
    """serve(pool): take part in every program that is opened, until told to stop (or idle, where threads park)."""
    function = Function(module, "serve", [POINTER])
    (pool,) = function.arguments
    epoch, active = _field(function, pool, "epoch"), _field(function, pool, "active")
    turns, seen = function.reserve(I32), function.reserve(I32)
    function.store(function.constant(0, I32), turns)
    function.store(function.constant(0, I32), seen)
    with function.repeat() as leave_if:
        now = function.atomic_load(epoch)
        leave_if(function.atomic_load(_field(function, pool, "stop")).compare("!=", 0))
        is_new = now.compare("!=", function.load(seen, I32))
        with function.when(is_new):
            function.store(now, seen)
            function.atomic_add(active, 1)
            with function.when(function.atomic_load(_field(function, pool, "open")).compare("==", now)):
                program = function.load(_field(function, pool, "program"), POINTER)
                function.call_own("walk", pool, program, function.load(_field(function, pool, "count"), I64))
            left = function.atomic_add(active, -1)
            sleeping = function.atomic_load(_field(function, pool, "sleeping"))
            with function.when(left.compare("==", 1)), function.when(sleeping.compare("!=", 0)):
                _futex(function, pool, active, WAKE, function.constant(1 << 20, I32))
            function.store(function.constant(0, I32), turns)
        with function.when(is_new.compare("==", 0)):
            function.pause(_is_x86())
            turn = function.load(turns, I32) + 1
            function.store(turn, turns)
        is_idle = function.load(turns, I32).compare(">", function.load(_field(function, pool, "idle"), I32))
        leave_if(is_idle & function.load(_field(function, pool, "parks"), I32).compare("!=", 0))
        with function.when(is_idle):
            asleep = _field(function, pool, "asleep")
            function.atomic_add(asleep, 1)
            _futex(function, pool, epoch, WAIT, now)
            function.atomic_add(asleep, -1)
            function.store(function.constant(0, I32), turns)
    function.close()


class Workers:
    """`threads` threads, the caller's own among them. Programs of several callers run one after the other.

    parks  idle threads sleep in Python instead of in the system's futex; by default only where there is none
    """

    def __init__(self, compiler: Compiler, threads: int, *, parks: bool | None = None) -> None:
        addresses = compiler.compile("workers", ("run", "serve"), emit_workers)
        self._compiler = compiler  # holds the machine code
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(addresses["run"])
        self._serve = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(addresses["serve"])
        self._lock = threading.Lock()
        self.threads = threads
        self._parks = not _has_futex() if parks is None else parks
        self._start()

    def _start(self) -> None:
        self._pool = _Pool(self._parks)
        self._process = os.getpid()
        for number in range(1, self.threads):
            arguments = (self._serve, self._pool, self._compiler)
            thread = threading.Thread(target=_work, args=arguments, daemon=True, name=f"chatglm kernels {number}")
            thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._pool, self._run, self._compiler)

    def run(self, program: Program, start: int = 0, stop: int | None = None) -> None:
        """Run a program, or its operations from `start` up to `stop`; Python's lock is free meanwhile."""
        count = (program.count if stop is None else stop) - start
        with self._lock:
            if os.getpid() != self._process:  # threads do not survive a fork
                self._finalizer.detach()
                self._start()
            self._pool.wake_parked()
            self._run(self._pool.address, program.address + start * 8 * OPERATION_WORDS, count)


class _Pool:
    """The memory that the native loops share, and where threads sleep that have no futex."""

    def __init__(self, parks: bool) -> None:
        memory = numpy.zeros(LINE * (len(POOL) + 1), dtype=numpy.uint8)
        start = -memory.ctypes.data % LINE
        self.address = memory.ctypes.data + start
        self._fields = memory[start : start + LINE * len(POOL)].view(numpy.int64).reshape(len(POOL), -1)
        self.set("syscall", _address_of("sched_yield") if parks else _address_of("syscall"))
        self.set("idle", IDLE_SPINS)
        self.set("parks", int(parks))
        self._parked = 0
        self._changing = threading.Lock()
        self._woken = threading.Semaphore(0)

    def set(self, name: str, value: int) -> None:
        self._fields[POOL.index(name), 0] = value

    @property
    def is_stopped(self) -> bool:
        return bool(self._fields[POOL.index("stop"), 0])

    def park(self) -> None:
        """Sleep until the next program."""
        with self._changing:
            self._parked += 1
        self._woken.acquire()

    def wake_parked(self) -> None:
        """Wake all who sleep in Python. One that is late misses a program, which the others then do without it."""
        if self._parked:
            with self._changing:
                count, self._parked = self._parked, 0
            self._woken.release(count)


def _work(serve: Any, pool: _Pool, compiler: Compiler) -> None:
    """What a thread does all its life; it holds the machine code that it runs."""
    serve(pool.address)
    while not pool.is_stopped:
        pool.park()
        serve(pool.address)


def _stop(pool: _Pool, run: Any, compiler: Compiler) -> None:
    pool.set("stop", 1)
    pool.wake_parked()
    run(pool.address, None, 0)  # wakes those who sleep in the system


def _has_futex() -> bool:
    return sys.platform == "linux" and platform.machine().lower() in FUTEX


def _address_of(name: str) -> int:
    """The address of a function of the C library: `syscall`, or `sched_yield`, which gives the core to others."""
    if os.name == "nt":
        library, name = ctypes.WinDLL("kernel32"), "SwitchToThread"  # type: ignore[attr-defined,unused-ignore]
    else:
        library = ctypes.CDLL(None)
    return int(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0)
