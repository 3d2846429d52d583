"""What a run file says: one frozen dataclass a section. Every stage has these sections and may add its own.

Precedence: flags, then the file, then the defaults here. The resolved values are written into the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import TrainingError
from .settings import build, in_range, override, put, read_yaml

AT_LEAST_0, AT_LEAST_1, SHARE = in_range(low=0), in_range(low=1), in_range(low=0, high=1)


@dataclass(frozen=True)
class ModelSettings:
    """Where the run starts.

    source      a checkpoint folder or hub name; "embedded" is the model inside the package; None: random weights
    config      sizes of a model with random weights (keys of ModelConfig)
    tokenizer   folder or file of the tokenizer, where `source` brings none
    deepnorm    draw random weights for the residual scale √(2·layers) of this depth, not the original's fixed √56
    """

    source: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    deepnorm: bool = True


@dataclass(frozen=True)
class BatchSettings:
    """How many rows a step sees, and in which portions.

    rows        rows of the global batch (all processes, all micro-batches), the final number where it grows
    micro_rows  rows that one process computes at once; the rest is accumulated
    length      tokens of a row
    ramp_from   rows at the beginning; None: no ramp. It grows evenly to `rows`
    ramp_rows   … until so many rows were read, in multiples of ramp_step
    """

    rows: int = field(default=32, metadata=AT_LEAST_1)
    micro_rows: int = field(default=1, metadata=AT_LEAST_1)
    length: int = field(default=2048, metadata=in_range(low=8))
    ramp_from: int | None = field(default=None, metadata=AT_LEAST_1)
    ramp_rows: int = field(default=0, metadata=AT_LEAST_0)
    ramp_step: int = field(default=1, metadata=AT_LEAST_1)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter 2019) and what is done to gradients before it. Defaults: GLM-130B, table 11."""

    lr: float = field(default=1e-4, metadata=AT_LEAST_0)
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata=SHARE)
    eps: float = field(default=1e-8, metadata=in_range(low=1e-12))
    weight_decay: float = field(default=0.1, metadata=AT_LEAST_0)
    clip: float = field(default=1.0, metadata=AT_LEAST_0)


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate as a multiple of `optimizer.lr`, by step.

    kind           cosine, linear: to `floor` at the last step; constant; constant_decay: constant, then linear over
                   the last `decay` share of the steps
    warmup         steps from `warmup_from` to 1 [a tenth of the run, at most 100]
    floor          lowest multiple
    steps          length of the schedule [the run's steps]
    """

    kind: Literal["cosine", "linear", "constant", "constant_decay"] = "cosine"
    warmup: int | None = field(default=None, metadata=AT_LEAST_0)
    warmup_from: float = field(default=0.0, metadata=SHARE)
    floor: float = field(default=0.1, metadata=SHARE)
    decay: float = field(default=0.2, metadata=SHARE)
    steps: int | None = field(default=None, metadata=AT_LEAST_1)


@dataclass(frozen=True)
class StabilitySettings:
    """What happens when a run goes wrong (spec: GLM-130B §3 and its log).

    embedding_shrink   α of e = α·e + (1-α)·stop(e): what the input embedding keeps of its gradient; 1: all of it
    shrink_points      [[step, α], …] with lines between them, in the place of a constant
    norm_factor        gradient norm above this multiple of the running median counts; 0: never
    norm_patience      … so many steps in a row are a spike
    loss_factor        a loss above this multiple of the running median is a spike; 0: never
    window             good steps of the running medians
    min_history        good steps before any verdict
    skip_batches       batches that are skipped, from the checkpoint that a spike goes back to
    shrink_factor      α is multiplied by this after a spike
    max_restores       spikes before the run gives up
    max_nonfinite      steps in a row with non-finite gradients before the run gives up
    loss_scale         first loss scale of fp16; doubled after `loss_scale_window` good steps
    """

    embedding_shrink: float = field(default=1.0, metadata=SHARE)
    shrink_points: tuple[tuple[float, float], ...] = ()
    norm_factor: float = field(default=10.0, metadata=AT_LEAST_0)
    norm_patience: int = field(default=5, metadata=AT_LEAST_1)
    loss_factor: float = field(default=1.5, metadata=AT_LEAST_0)
    window: int = field(default=100, metadata=AT_LEAST_1)
    min_history: int = field(default=20, metadata=AT_LEAST_1)
    skip_batches: int = field(default=200, metadata=AT_LEAST_0)
    shrink_factor: float = field(default=0.5, metadata=SHARE)
    max_restores: int = field(default=3, metadata=AT_LEAST_0)
    max_nonfinite: int = field(default=20, metadata=AT_LEAST_1)
    loss_scale: float = field(default=65536.0, metadata=in_range(low=1))
    loss_scale_window: int = field(default=2000, metadata=AT_LEAST_1)


@dataclass(frozen=True)
class ParallelSettings:
    """Processes of one run, started by `torchrun`.

    strategy   ddp: whole model in every process; fsdp: parameters, gradients and optimiser state in parts; auto: fsdp
    tensor     processes that share each matrix (tensor parallel); the others share the data
    timeout_s  a collective that takes longer ends the run
    stall_s    a step, evaluation or checkpoint that takes longer is reported with the stack of every thread and ends
               the process (exit code 75), so that torchrun begins anew from the last checkpoint; 0: never
    """

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    tensor: int = field(default=1, metadata=AT_LEAST_1)
    timeout_s: float = field(default=1800.0, metadata=in_range(low=1))
    stall_s: float = field(default=0.0, metadata=AT_LEAST_0)


@dataclass(frozen=True)
class ComputeSettings:
    """Where and how the arithmetic runs.

    precision   auto: bf16 on a GPU that has it, else fp32. Weights, gradients and optimiser state are fp32 with each
    checkpointing  keep only the input of every layer for the backward pass, and compute the layer again there
    """

    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    checkpointing: bool = False
    compile: bool = False
    compile_backend: str = "inductor"
    threads: int | None = field(default=None, metadata=AT_LEAST_1)


@dataclass(frozen=True)
class SaveSettings:
    """Checkpoints `OUT/step-000100`.

    every       steps between two; 0: only at the end and on SIGTERM
    keep        newest ones that stay
    keep_every  every so many steps one stays for good; 0: none
    background  write while the next steps run, at the price of a second copy in CPU memory
    """

    every: int = field(default=250, metadata=AT_LEAST_0)
    keep: int = field(default=2, metadata=AT_LEAST_1)
    keep_every: int = field(default=0, metadata=AT_LEAST_0)
    background: bool = False


@dataclass(frozen=True)
class ExportSettings:
    """`OUT/model`, which `chatglm.load`, `chatglm serve` and AutoModel open."""

    enabled: bool = True
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


@dataclass(frozen=True)
class LogSettings:
    """`OUT/metrics.jsonl`, TensorBoard, and the progress line."""

    every: int = field(default=10, metadata=AT_LEAST_1)
    tensorboard: bool = True


@dataclass(frozen=True)
class EvaluateSettings:
    """Loss on fixed rows that are never trained on.

    every   steps between two; 0: only at the end
    rows    rows that are scored
    """

    every: int = field(default=0, metadata=AT_LEAST_0)
    rows: int = field(default=16, metadata=AT_LEAST_0)


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `steps` or `epochs` says how long. Stages add sections of their own, such as `data`."""

    out: Path
    steps: int | None = field(default=None, metadata=AT_LEAST_1)
    epochs: float | None = field(default=None, metadata=AT_LEAST_0)
    seed: int = field(default=0, metadata=AT_LEAST_0)
    model: ModelSettings = ModelSettings()
    method: Mapping[str, Any] = field(default_factory=lambda: {"name": "full"})
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    stability: StabilitySettings = StabilitySettings()
    compute: ComputeSettings = ComputeSettings()
    parallel: ParallelSettings = ParallelSettings()
    save: SaveSettings = SaveSettings()
    export: ExportSettings = ExportSettings()
    log: LogSettings = LogSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    def __post_init__(self) -> None:
        batch = self.batch
        if (self.steps is None) == (self.epochs is None):
            raise TrainingError("give `steps` or `epochs`, one of them", cure="steps: 1000")
        if batch.ramp_from is not None and batch.ramp_from > batch.rows:
            raise TrainingError(f"`batch.ramp_from` is {batch.ramp_from}, above `batch.rows` {batch.rows}")


Run = TypeVar("Run", bound=RunConfig)


def read_run(
    path: Path | None,
    kind: type[Run],
    *,
    changes: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Run:
    """The run of a file, with `--set` changes and named flags (dotted keys) on top.

    Raises TrainingError naming file, key and what is allowed, with the nearest key for an unknown one.
    """
    mapping = {} if path is None else read_yaml(path)
    mapping = override(mapping, changes)
    for key, value in (flags or {}).items():
        if value is not None:
            put(mapping, key, value)
            if key in ("steps", "epochs"):
                mapping.pop("epochs" if key == "steps" else "steps", None)
    return build(kind, mapping, str(path) if path else "run")


def with_changes(run: Run, **sections: Any) -> Run:
    """A copy with other values, for programs: `with_changes(run, steps=5)`."""
    return replace(run, **sections)
