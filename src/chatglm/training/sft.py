"""`chatglm train sft`: answers to prompts, from a pre-trained checkpoint. Only answers have a loss, from `sop` on.

Recipe: the original's full fine-tuning (lr 1e-4 there, on one task); lower here, where a model keeps its abilities.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .loop import Report, train
from .metrics import Say
from .run_config import ModelSettings, OptimizerSettings, StabilitySettings
from .starting import EMBEDDED
from .text_stage import TextRun, text_task


@dataclass(frozen=True)
class SFTRun(TextRun):
    """A run of this stage. Losses of short answers jump, so no loss is taken for a spike."""

    model: ModelSettings = field(default_factory=lambda: ModelSettings(source=EMBEDDED))
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=2e-5, weight_decay=0.0))
    stability: StabilitySettings = field(default_factory=lambda: StabilitySettings(loss_factor=0.0))


def run(config: SFTRun, *, progress: Say | None = None, restart: bool = False) -> Report:
    """Fine-tune to the end of the run, or go on where it was interrupted."""
    return train(text_task(config), config, progress=progress, restart=restart)
