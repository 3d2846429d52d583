"""`chatglm train pretrain`: blank infilling on text (and instruction samples), from random weights or a checkpoint.

Recipe: GLM-130B, table 11; ChatGLM-6B's own was not published (spec/training.md §2).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .loop import Report, train
from .metrics import Say
from .run_config import StabilitySettings
from .text_stage import TextRun, text_task


@dataclass(frozen=True)
class PretrainRun(TextRun):
    """A run of this stage: α 0.1 on the embedding's gradient, as GLM-130B ended."""

    stability: StabilitySettings = field(default_factory=lambda: StabilitySettings(embedding_shrink=0.1))


def run(config: PretrainRun, *, progress: Say | None = None, restart: bool = False) -> Report:
    """Pre-train to the end of the run, or go on where it was interrupted."""
    return train(text_task(config), config, progress=progress, restart=restart)
