"""`chatglm train ppo`."""

from __future__ import annotations

from .options import CommonOptions
from .train_options import RunFile, RunOptions, run_stage


def ppo(file: RunFile = None, *, options: RunOptions, common: CommonOptions) -> None:
    """Learn from rewards for own answers, token by token, with a value model.

    FILE is YAML (examples/training/ppo.yaml); flags and --set win over it. A run folder with checkpoints is
    gone on with.

    Try: chatglm train ppo examples/training/ppo.yaml --dry-run
    """
    from ..training.rlhf import online_stage as stage
    from ..training.rlhf.look_ahead import look_at_prompts

    run_stage(stage.PPORun, stage.run_ppo, file, options, common, look_at_prompts)
