"""`chatglm train sft`."""

from __future__ import annotations

from .options import CommonOptions
from .train_options import RunFile, RunOptions, run_stage


def sft(file: RunFile = None, *, options: RunOptions, common: CommonOptions) -> None:
    """Learn to answer: only answers have a loss, from the first token to the end.

    FILE is YAML (examples/training/sft.yaml); flags and --set win over it. A run folder with checkpoints is
    gone on with. On several GPUs: torchrun --nproc-per-node N -m chatglm.cli train sft FILE

    Try: chatglm train sft examples/training/sft.yaml --dry-run
    """
    from ..training import sft as stage
    from ..training.text_stage import look_ahead

    run_stage(stage.SFTRun, stage.run, file, options, common, look_ahead)
