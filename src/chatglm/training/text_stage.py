"""What the stages that learn from tokens share: their data section, and the task of a run over a stream of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import TrainingError
from ..model import GLM
from .adapters.costs import costs
from .attending import attend_for
from .data.mixing import hold_out
from .data.opening import Ingredient, open_stream
from .data.streams import Stream
from .forecast import forecast, lines_of
from .loss import loss_positions, token_losses
from .methods import Tuned, method_name, tuned
from .run_config import AT_LEAST_0, RunConfig
from .samples import Batch, Sample, collate
from .schedules import steps_for
from .settings import build
from .starting import starting_config, starting_tokenizer
from .task import MeteredLoss, Task

OBJECTIVES = ("token", "sentence", "document", "instruction", "dialogue")
"""Whose losses are logged apart."""


@dataclass(frozen=True)
class DataSettings:
    """Prepared data (`chatglm data prepare`).

    train      folders of prepared sets, mixture files, or sections {set:, weight:, part:, texts:, objective:}
    held_out   the same, never trained on; None: about `held_out_rows` rows of `train` are left out and scored
    objective  blank infilling mixture of every text, by name, in the place of what `train` says
    """

    train: tuple[Any, ...] = ()
    held_out: tuple[Any, ...] = ()
    held_out_rows: int = field(default=0, metadata=AT_LEAST_0)
    objective: str | None = None


@dataclass(frozen=True)
class TextRun(RunConfig):
    """A run over prepared data."""

    data: DataSettings = DataSettings()


@dataclass(frozen=True)
class NamedBatch:
    """A batch that knows which objective each of its samples has: int64 [batch, samples], indices of OBJECTIVES."""

    batch: Batch
    objectives: Tensor

    @property
    def tokens(self) -> int:
        return self.batch.tokens

    def to(self, device: torch.device | str) -> NamedBatch:
        return NamedBatch(self.batch.to(device), self.objectives.to(device))


@dataclass(frozen=True)
class NamedSource:
    """A stream as rows for the loop."""

    stream: Stream

    @property
    def rows_per_epoch(self) -> int:
        return self.stream.rows_per_epoch

    def batch(self, start: int, count: int) -> NamedBatch:
        """Rows start … start + count - 1, as many tokens wide as the stream's rows."""
        rows = [self.stream.row(start + place) for place in range(count)]
        return NamedBatch(collate(rows, self.stream.length), _objectives(rows))


def _objectives(rows: list[list[Sample]]) -> Tensor:
    found = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for number, row in enumerate(rows):
        for place, sample in enumerate(row):
            found[number, place] = OBJECTIVES.index(sample.objective)
    return found


def named_loss(model: nn.Module, named: NamedBatch) -> MeteredLoss:
    """Cross entropy over the batch's loss positions, and that of each objective."""
    batch = named.batch
    glm = next(module for module in model.modules() if isinstance(module, GLM))
    attend = attend_for(batch, glm.config)
    losses = token_losses(glm, batch, attend=attend)
    rows, tokens = loss_positions(batch)
    kind = named.objectives[rows, batch.document[rows, tokens].long()]  # [n]
    sums = torch.zeros(len(OBJECTIVES), device=losses.device).index_add_(0, kind, losses.detach())
    counts = torch.bincount(kind, minlength=len(OBJECTIVES))
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
        f"loss_{name}": (sums[number], counts[number]) for number, name in enumerate(OBJECTIVES)
    }
    return MeteredLoss(losses.sum(), losses.numel(), metrics)


def text_task(run: TextRun, *, check: Callable[[Stream], None] | None = None) -> Task:
    """Model, data and loss of a run. Raises TrainingError where they do not fit each other."""
    made: Tuned = tuned(run, may_be_empty=True)
    config = made.glm.config
    _check_length(run.batch.length, config)
    stream = opened(run.data.train, run, config, "data.train")
    if check is not None:
        check(stream)
    held_out = None
    if run.data.held_out:
        held_out = NamedSource(opened(run.data.held_out, run, config, "data.held_out"))
    elif run.data.held_out_rows:
        stream, rows = hold_out(stream, run.data.held_out_rows)
        held_out = NamedSource(rows)
    return Task(made.model, named_loss, NamedSource(stream), held_out, exported=made.exported, fill=made.fill)


def opened(data: tuple[Any, ...], run: RunConfig, config: ModelConfig, key: str) -> Stream:
    """The stream of a list of prepared sets and mixtures."""
    if not data:
        raise TrainingError(f"`{key}` names no data", cure="chatglm data prepare FILES --out DIR, then data.train: DIR")
    items: list[Ingredient | str] = []
    for number, item in enumerate(data):
        is_section = isinstance(item, Mapping)
        items.append(build(Ingredient, item, "run", f"{key}[{number}].") if is_section else str(item))
    encoding = "1d" if config.position_encoding == "rotary_1d" else "2d"
    objective = getattr(getattr(run, "data", None), "objective", None)
    return open_stream(
        items, length=run.batch.length, seed=run.seed, encoding=encoding, objective=objective, config=config
    )


def _check_length(length: int, config: ModelConfig) -> None:
    if length > config.max_sequence_length and config.position_encoding == "learned_2d":
        raise TrainingError(
            f"`batch.length` is {length}, the model has {config.max_sequence_length} learned positions",
            cure=f"batch.length: {config.max_sequence_length}",
        )


def look_ahead(run: TextRun) -> dict[str, Any]:
    """What --dry-run tells: the data and the description of the model are opened, no weight is read."""
    method_name(run)
    config = starting_config(run.model)
    starting_tokenizer(run.model, config)
    _check_length(run.batch.length, config)
    stream = opened(run.data.train, run, config, "data.train")
    if run.data.held_out:
        opened(run.data.held_out, run, config, "data.held_out")
    rows = max(1, stream.rows_per_epoch - (0 if run.data.held_out else run.data.held_out_rows))
    steps = run.steps if run.steps is not None else steps_for(math.ceil(rows * (run.epochs or 1)), run.batch)
    trained, frozen = costs(run) or (None, 0)
    told = forecast(run, config, trained=trained, frozen_bytes=frozen, steps=steps)
    data = {"rows_per_epoch": rows, "length": stream.length, "epochs": steps * run.batch.rows / rows}
    line = f"data       {rows:,} rows of {stream.length} tokens, read {data['epochs']:.2f} times"
    return {"forecast": told.as_mapping(), "data": data, "lines": [*lines_of(told), line]}
