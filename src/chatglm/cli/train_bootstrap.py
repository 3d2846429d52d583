"""`chatglm train bootstrap`."""

from __future__ import annotations

from .options import CommonOptions
from .train_options import RunFile, RunOptions, run_stage


def bootstrap(file: RunFile = None, *, options: RunOptions, common: CommonOptions) -> None:
    """Answer prompts several times, keep what scores best, fine-tune on it, and again.

    FILE is YAML (examples/training/bootstrap.yaml); flags and --set win over it. A run folder with checkpoints is
    gone on with.

    Try: chatglm train bootstrap examples/training/bootstrap.yaml --dry-run
    """
    from ..training.rlhf import bootstrap_stage as stage
    from ..training.rlhf.look_ahead import look_at_bootstrap

    run_stage(stage.BootstrapRun, stage.run, file, options, common, look_at_bootstrap)
