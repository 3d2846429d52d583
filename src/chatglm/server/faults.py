"""Faults to be injected by tests: `serve --enable-faults` with CHATGLM_FAULTS='{"raise_at_step": 20, …}'."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..engine.serving import ServingEngine, StreamEvent
from ..engine.stream import Stream
from ..engine.thread import HANG_S
from ..errors import RequestError


@dataclass
class Faults:
    """What is to go wrong. Steps count over all engines, so a fault strikes once (`every`: at each multiple).

    nan_text     logits of choices whose context has this token id become NaN at token `nan_at`
    step_delay   seconds that each step takes longer
    hang_s       when a step counts as hanging
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
    pool_blocks: int | None = None
    steps: int = 0

    @classmethod
    def parse(cls, text: str | None) -> Faults:
        """From JSON. Raises RequestError for a name that is none."""
        given = json.loads(text) if text else {}
        unknown = set(given) - {field.name for field in fields(cls)}
        if unknown:
            raise RequestError(f"CHATGLM_FAULTS has unknown names: {', '.join(sorted(unknown))}")
        return cls(**given)

    def _is_due(self, at: int | None) -> bool:
        return at is not None and (self.steps % at == 0 if self.every else self.steps == at)

    def change_logits(self, logits: Tensor, streams: list[Stream]) -> Tensor:
        """NaN where asked for."""
        if self.nan_token is None:
            return logits
        logits = logits.clone()
        for row, stream in enumerate(streams):
            if self.nan_token in stream.context_ids and len(stream.generated_ids) == self.nan_at:
                logits[row] = torch.nan
        return logits

    def wrap(self, build: Callable[[], ServingEngine]) -> Callable[[], ServingEngine]:
        """Engines whose steps go wrong as asked."""

        def faulty() -> ServingEngine:
            engine = build()
            step = engine.step

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
            return engine

        return faulty
