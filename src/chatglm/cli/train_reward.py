"""`chatglm train reward`."""

from __future__ import annotations

from .options import CommonOptions
from .train_options import RunFile, RunOptions, run_stage


def reward(file: RunFile = None, *, options: RunOptions, common: CommonOptions) -> None:
    """Learn a score for answers from pairs in which one was preferred, and report on pairs it has not seen.

    FILE is YAML (examples/training/reward.yaml); flags and --set win over it. A run folder with checkpoints is
    gone on with.

    Try: chatglm train reward examples/training/reward.yaml --dry-run
    """
    from ..training.rlhf import reward_stage as stage
    from ..training.rlhf.look_ahead import look_at_pairs

    run_stage(
        stage.RewardRun, stage.run, file, options, common, look_at_pairs, "chatglm train ppo --set reward.model={model}"
    )
