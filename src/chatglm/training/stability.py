"""When to step, to skip, to go back, and to give up. Pure bookkeeping: numbers in, a verdict out; resumes exactly.

A spike of the gradient norm comes before a collapse; GLM-130B went back to the last checkpoint, skipped the data and
shrank the embedding's gradient further (its training log; spec/training.md §2.2).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from ..errors import TrainingError
from .run_config import StabilitySettings

HYSTERESIS = 2
"""fp16: so many overflows before the loss scale is halved."""
LEAST_LOSS_SCALE = 1.0


class Verdict(Enum):
    """What to do with the gradients of a step."""

    STEP = "step"
    SKIP = "skip"
    RESTORE = "restore"


@dataclass
class Watch:
    """What the policies remember. Plain numbers, saved with every checkpoint.

    losses, norms  of the last good steps
    high_norms     steps in a row with a norm above the limit
    nonfinite      skipped steps in all; nonfinite_run: in a row
    restores       spikes so far
    shrink         factor on the embedding's α, halved by every spike
    loss_scale     of fp16, good_steps and overflows steer it; 1 otherwise
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    high_norms: int = 0
    nonfinite: int = 0
    nonfinite_run: int = 0
    restores: int = 0
    shrink: float = 1.0
    loss_scale: float = 1.0
    good_steps: int = 0
    overflows: int = 0

    def as_mapping(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> Watch:
        return cls(**mapping)

    def judge(self, loss: float, norm: float, settings: StabilitySettings, *, is_scaled: bool) -> Verdict:
        """What to do with a step of this loss and (unclipped) gradient norm.

        is_scaled  the loss was scaled (fp16), so an overflow is normal and asks for a smaller scale
        Raises TrainingError when gradients stay non-finite.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._overflowed(settings, is_scaled)
            return Verdict.SKIP
        self.nonfinite_run = 0
        if is_scaled:
            self._grow_scale(settings)
        if self._is_spike(loss, norm, settings):
            return Verdict.RESTORE
        if not self.high_norms:  # a high norm must not teach the median
            self.losses = [*self.losses, loss][-settings.window :]
            self.norms = [*self.norms, norm][-settings.window :]
        return Verdict.STEP

    def restored(self, before: Watch, settings: StabilitySettings) -> None:
        """Count a spike, after which everything but the counters is as it was in the checkpoint (`before`)."""
        self.restores += 1
        if self.restores > settings.max_restores:
            raise TrainingError(
                f"the loss or the gradient norm spiked {self.restores} times; "
                f"`stability.max_restores` is {settings.max_restores}",
                cure="lower optimizer.lr or stability.embedding_shrink, or use bf16; metrics.jsonl shows where",
            )
        self.shrink *= settings.shrink_factor
        self.losses, self.norms, self.high_norms = list(before.losses), list(before.norms), 0

    def _is_spike(self, loss: float, norm: float, settings: StabilitySettings) -> bool:
        if len(self.norms) < settings.min_history:
            return False
        is_high = settings.norm_factor > 0 and norm > settings.norm_factor * statistics.median(self.norms)
        self.high_norms = self.high_norms + 1 if is_high else 0
        if self.high_norms >= settings.norm_patience:
            return True
        return settings.loss_factor > 0 and loss > settings.loss_factor * statistics.median(self.losses)

    def _overflowed(self, settings: StabilitySettings, is_scaled: bool) -> None:
        self.nonfinite += 1
        self.nonfinite_run += 1
        if is_scaled:
            self.good_steps = 0
            self.overflows += 1
            if self.overflows >= HYSTERESIS:
                self.loss_scale = max(self.loss_scale / 2, LEAST_LOSS_SCALE)
        if self.nonfinite_run >= settings.max_nonfinite and self.loss_scale <= LEAST_LOSS_SCALE:
            raise TrainingError(
                f"the gradients were not finite in {self.nonfinite_run} steps in a row",
                cure="lower optimizer.lr, or use bf16 or fp32 (compute.precision)",
            )

    def _grow_scale(self, settings: StabilitySettings) -> None:
        self.good_steps += 1
        if self.good_steps % settings.loss_scale_window == 0:
            self.loss_scale *= 2
            self.overflows = 0
