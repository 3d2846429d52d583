"""`chatglm train pretrain`."""

from __future__ import annotations

from .options import CommonOptions
from .train_options import RunFile, RunOptions, run_stage


def pretrain(file: RunFile = None, *, options: RunOptions, common: CommonOptions) -> None:
    """Blank infilling on prepared text: spans, sentences and endings are left out and learned.

    FILE is YAML (examples/training/pretrain.yaml); flags and --set win over it. A run folder with checkpoints is
    gone on with. On several GPUs: torchrun --nproc-per-node N -m chatglm.cli train pretrain FILE

    Try: chatglm train pretrain examples/training/pretrain.yaml --dry-run
    """
    from ..training import pretrain as stage
    from ..training.text_stage import look_ahead

    run_stage(stage.PretrainRun, stage.run, file, options, common, look_ahead)
