"""Ends a process that hangs: where a part of the run takes too long, the stack of every thread is written to stderr.

A collective that a lost process never joins, a file system that does not answer, a data reader that waits for ever:
none of these raises an error. The exit of a process is one, and `torchrun --max-restarts` then starts the group anew
from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import NoReturn

HUNG = 75
"""Exit code of a process that was ended so: EX_TEMPFAIL of sysexits.h, try again."""


class Watchdog:
    """Waits for the end of what is expected, in a thread of its own.

    limit_s  seconds that each part may take; 0: nothing is watched
    who      named in the report, e.g. "process 1 of 8"
    end      called with the report when a part took longer; by default it does not return
    """

    def __init__(self, limit_s: float, who: str, end: Callable[[str], None] | None = None) -> None:
        self.limit_s, self.who, self.end = limit_s, who, end or end_process
        self.changed = threading.Condition()
        self.expected: str | None = None
        self.turn = 0
        self.is_closed = False
        self.thread: threading.Thread | None = None
        if limit_s > 0:
            self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.thread.start()

    def expect(self, what: str | None) -> None:
        """`what` begins now, and what was before has ended; None: nothing is watched until the next call."""
        with self.changed:
            self.expected = what
            self.turn += 1
            self.changed.notify()

    def close(self) -> None:
        """Watch no longer."""
        with self.changed:
            self.is_closed = True
            self.changed.notify()
        if self.thread is not None:
            self.thread.join()

    def _has_moved(self, turn: int) -> bool:
        return self.turn != turn or self.is_closed

    def _watch(self) -> None:
        with self.changed:
            while not self.is_closed:
                if self.expected is None:
                    self.changed.wait()
                    continue
                turn, what = self.turn, self.expected
                if not self.changed.wait_for(partial(self._has_moved, turn), self.limit_s):
                    self.expected = None
                    self.end(
                        f"{self.who} hangs: {what} has not ended within {self.limit_s:g} s (parallel.stall_s)\n"
                        "  cure: the stacks below say where; the same command goes on from the last checkpoint, "
                        "`torchrun --max-restarts 3` does so by itself"
                    )


def end_process(report: str) -> NoReturn:
    """Say what hangs and where, and exit at once: a thread that hangs cannot be asked to."""
    stream = sys.__stderr__
    if stream is not None:
        stream.write(f"TrainingError: {report}\n")
        stream.flush()
        faulthandler.dump_traceback(file=stream, all_threads=True)
    os._exit(HUNG)
