"""`chatglm train dpo`."""

from __future__ import annotations

from .options import CommonOptions
from .train_options import RunFile, RunOptions, run_stage


def dpo(file: RunFile = None, *, options: RunOptions, common: CommonOptions) -> None:
    """Learn from pairs in which one answer was preferred, without a reward model.

    FILE is YAML (examples/training/dpo.yaml); flags and --set win over it. A run folder with checkpoints is
    gone on with.

    Try: chatglm train dpo examples/training/dpo.yaml --dry-run
    """
    from ..training.rlhf import dpo_stage as stage
    from ..training.rlhf.look_ahead import look_at_pairs

    run_stage(stage.DPORun, stage.run, file, options, common, look_at_pairs)
