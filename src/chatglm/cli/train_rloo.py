"""`chatglm train rloo`."""

from __future__ import annotations

from .options import CommonOptions
from .train_options import RunFile, RunOptions, run_stage


def rloo(file: RunFile = None, *, options: RunOptions, common: CommonOptions) -> None:
    """Learn from rewards for own answers, several to a prompt against each other (RLOO or GRPO).

    FILE is YAML (examples/training/rloo.yaml); flags and --set win over it. A run folder with checkpoints is
    gone on with.

    Try: chatglm train rloo examples/training/rloo.yaml --dry-run
    """
    from ..training.rlhf import online_stage as stage
    from ..training.rlhf.look_ahead import look_at_prompts

    run_stage(stage.RLOORun, stage.run_rloo, file, options, common, look_at_prompts)
