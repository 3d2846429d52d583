"""`generate` as an iterator: transformers pushes tokens into a streamer, and a caller wants to pull them.

The loop runs in a thread, but never beside the caller: each step waits until the caller asks for it. So random numbers
are drawn in the same order as by `generate`, and an iterator that is closed ends the loop at its next token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class _Closed(Exception):
    """Unwinds the loop when nobody wants more tokens."""


class _HandOver:
    """A streamer (`put`, `end`) that passes tokens on one step at a time."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.error: BaseException | None = None
        self.is_done = False
        self._is_closed = False
        self._is_context = True
        self._wanted = threading.Semaphore(0)
        self._ready = threading.Semaphore(0)

    def put(self, tokens: Tensor) -> None:
        if self._is_context:  # the first call brings the context, not a step
            self._is_context = False
            return
        self.tokens = tokens
        self._ready.release()
        self.wait_until_wanted()

    def end(self) -> None:
        """Nothing more comes; `run` says so once `generate` has returned."""

    def wait_until_wanted(self) -> None:
        self._wanted.acquire()
        if self._is_closed:
            raise _Closed

    def next(self) -> Tensor | None:
        """The tokens of one more step, or None at the end. Raises what the loop raised."""
        self.tokens = None
        self._wanted.release()
        self._ready.acquire()
        if self.error is not None:
            raise self.error
        return self.tokens

    def close(self) -> None:
        self._is_closed = True
        self._wanted.release()

    def finish(self, error: BaseException | None) -> None:
        self.tokens, self.error, self.is_done = None, error, True
        self._ready.release()


def stepwise(generate: Callable[[Any], Any], device: torch.device) -> Iterator[Tensor]:
    """The tokens [batch] of each step of `generate(streamer)`, one step a `next`."""
    hand_over = _HandOver()

    def run() -> None:
        error: BaseException | None = None
        try:
            hand_over.wait_until_wanted()
            if device.type == "cuda":
                torch.cuda.set_device(device)  # the current device belongs to a thread
            generate(hand_over)
        except _Closed:
            pass
        except BaseException as raised:  # handed to the caller, whatever it is
            error = raised
        hand_over.finish(error)

    thread = threading.Thread(target=run, name="chatglm-stream", daemon=True)
    thread.start()
    try:
        while (tokens := hand_over.next()) is not None:
            yield tokens if tokens.dim() else tokens[None]
    finally:
        hand_over.close()
        thread.join()
