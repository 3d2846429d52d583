"""Faults to be injected by tests: `serve --enable-faults` with CHATGLM_FAULTS='{"raise_at_step": 20, …}'."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, fields
from sqlite3 import Connection

import torch
from torch import Tensor

from ..engine.runner import Prefill
from ..engine.serving import ServingEngine
from ..engine.serving_state import StreamEvent
from ..engine.stream import Stream
from ..engine.thread import HANG_S, Build
from ..errors import RequestError
from .feedback.store import FeedbackStore


@dataclass
class Faults:
    """What is to go wrong. Steps count over all engines, so a fault strikes once (`every`: at each multiple).

    nan_token    logits of choices whose context has this token id become NaN at token `nan_at`; `inf_token`: +Inf
    memory_token first passes with this token id run out of memory, `memory_times` times
    step_delay   seconds that each step takes longer
    hang_s       when a step counts as hanging
    feedback_pages  pages that the feedback file may grow by before its disk counts as full
    """

    raise_at_step: int | None = None
    exit_at_step: int | None = None
    hang_at_step: int | None = None
    hang_for: float = 5.0
    hang_s: float = HANG_S
    every: bool = False
    nan_token: int | None = None
    nan_at: int = 1
    step_delay: float = 0.0
    inf_token: int | None = None
    memory_token: int | None = None
    memory_times: int = 1
    pool_blocks: int | None = None
    feedback_pages: int | None = None
    steps: int = 0

    @classmethod
    def parse(cls, text: str | None) -> Faults:
        """From JSON. Raises RequestError for a name that is none."""
        given = json.loads(text) if text else {}
        unknown = set(given) - {field.name for field in fields(cls)}
        if unknown:
            raise RequestError(f"CHATGLM_FAULTS has unknown names: {', '.join(sorted(unknown))}")
        return cls(**given)

    def fill(self, store: FeedbackStore) -> None:
        """Little room for feedback, where asked for: SQLite's own error, as on a full disk."""
        if self.feedback_pages is not None:
            more = self.feedback_pages

            def bound(connection: Connection) -> None:
                (pages,) = connection.execute("PRAGMA page_count").fetchone()
                connection.execute(f"PRAGMA max_page_count = {pages + more}")

            store.submit(bound).result()

    def _is_due(self, at: int | None) -> bool:
        return at is not None and (self.steps % at == 0 if self.every else self.steps == at)

    def change_logits(self, logits: Tensor, streams: list[Stream]) -> Tensor:
        """NaN and infinity where asked for."""
        bad = {self.nan_token: torch.nan, self.inf_token: torch.inf}
        bad.pop(None, None)
        if not bad:
            return logits
        logits = logits.clone()
        for row, stream in enumerate(streams):
            for token, value in bad.items():
                if token in stream.context_ids and len(stream.generated_ids) == self.nan_at:
                    logits[row] = value
        return logits

    def wrap(self, build: Build) -> Build:
        """Engines whose steps go wrong as asked."""

        def faulty(*, keep_memory: bool = True) -> ServingEngine:
            engine = build(keep_memory=keep_memory)
            step, begin = engine.step, engine.begin_pass

            def faulty_pass(streams: list[Stream]) -> Prefill:
                is_hit = any(self.memory_token in stream.context_ids for stream in streams)
                if is_hit and self.memory_times > 0:
                    self.memory_times -= 1
                    raise torch.OutOfMemoryError("injected fault")
                return begin(streams)

            def faulty_step() -> list[StreamEvent]:
                self.steps += 1
                if self.step_delay:
                    time.sleep(self.step_delay)
                if self._is_due(self.hang_at_step):
                    time.sleep(self.hang_for)
                if self._is_due(self.raise_at_step):
                    raise RuntimeError("injected fault")
                if self._is_due(self.exit_at_step):
                    raise SystemExit  # ends the thread without a word
                return step()

            engine.step = faulty_step  # type: ignore[method-assign]
            engine.begin_pass = faulty_pass  # type: ignore[method-assign]
            return engine

        return faulty
