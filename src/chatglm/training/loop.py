"""The one loop that every stage runs in.

A step: micro-batches forward and backward, gradients summed over processes and divided by the number of loss positions
of the **global** batch, a verdict (step, skip, go back), clipping, AdamW. `train` wraps it in checkpoints, evaluation,
logs and the stop signal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.atomic import write_whole
from ..errors import TrainingError
from .export import export
from .filling import give_memory
from .gathering import Collected, Reader, Timer, share_of
from .loss import LossSum
from .metrics import MetricsLog, Say, flops_per_token, line_of, peak_flops
from .optimizer import GradientNorms, gradient_norms, make_optimizer, scale_gradients, trained
from .preparing import DTYPES, precision_of, prepare
from .run_config import RunConfig
from .schedules import learning_rate_factor, on_lines, rows_at, steps_for
from .settings import as_mapping, as_yaml
from .sharding import (
    Forward,
    World,
    divided_by,
    glms,
    joined,
    outside_forward,
    over_processes,
    share_matrices,
    without_sum,
)
from .stability import Verdict, Watch
from .state import Checkpoints, Place, tensors_of
from .stopping import StopSignal
from .task import Source, Task
from .watchdog import Watchdog

SEED_STRIDE = 1_000_003
"""Seeds of neighbouring steps and processes lie this far apart."""


@dataclass
class Report:
    """What a run came to.

    losses    (step, loss) of every logged step
    finished  False where a signal stopped it
    stopped   why the stage ended the run before its last step, or None
    model     the exported folder, or None
    """

    out: Path
    step: int = 0
    tokens: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluation: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    nonfinite: int = 0
    restores: int = 0
    finished: bool = False
    stopped: str | None = None
    model: Path | None = None

    @property
    def loss(self) -> float:
        """Of the last logged step."""
        return self.losses[-1][1] if self.losses else math.nan


@dataclass(frozen=True)
class StepFigures:
    """Sums of one step over all processes and micro-batches."""

    loss: float
    count: float
    tokens: int
    rows: int
    norms: GradientNorms
    lr: float
    verdict: Verdict
    metrics: dict[str, float]
    seconds: dict[str, float]


def train(task: Task, run: RunConfig, *, progress: Say | None = None, restart: bool = False) -> Report:
    """Train to the end of the run, or to a stop signal; a run folder with checkpoints is gone on with.

    progress  gets a line of text every `log.every` steps
    restart   begin anew although the folder holds checkpoints
    Under `torchrun` every process calls it alike. Raises TrainingError with what to change.
    """
    with joined(run.parallel, run.compute) as world:
        trainer = Trainer(task, run, world, progress)
        try:
            return trainer.run_all(restart=restart)
        finally:
            trainer.close()


class Trainer:
    """The state of a run between steps."""

    def __init__(self, task: Task, run: RunConfig, world: World, progress: Say | None = None) -> None:
        self.task, self.run, self.world = task, run, world
        self.say: Say = progress if progress is not None and world.is_first else lambda line: None
        self.device = world.device
        self.precision = precision_of(run.compute, self.device)
        model = _in_fp32(task.model)
        if task.fill is None:
            model.to(self.device)
        share_matrices(model, world)
        self.hook = prepare(model, run.compute, self.device)
        self.module = over_processes(Forward(model, task.loss), world, DTYPES[self.precision])
        if task.fill is not None:
            give_memory(self.module, glms(model), self.device)
            task.fill(model)
        self.model = model
        self.optimizer = make_optimizer(model, run.optimizer)
        self.parameters = trained(model)
        self.place = Place(watch=Watch(loss_scale=run.stability.loss_scale if self.precision == "fp16" else 1.0))
        self.total = self._total_steps()
        save = run.save
        self.checkpoints = Checkpoints(
            run.out, world, keep=save.keep, keep_every=save.keep_every, background=save.background
        )
        self.saved_at: int | None = None
        self.metrics: MetricsLog | None = None
        self.reader = Reader()
        self.watchdog = Watchdog(run.parallel.stall_s, f"process {world.rank} of {world.size}")

    def close(self) -> None:
        """Let go of threads, files and hooks."""
        self.watchdog.close()
        self.reader.close()
        self.checkpoints.close()
        self.hook.remove()
        if self.metrics is not None:
            self.metrics.close()

    def run_all(self, *, restart: bool = False) -> Report:
        """Resume or begin, then step to the end."""
        self.begin(restart=restart)
        report = Report(self.run.out)
        begin, since = time.monotonic(), _Since(self.place)
        report.stopped = self._stage_stops()  # as it did before it was resumed
        with StopSignal() as stop:
            while self.place.step < self.total and not (report.stopped or self.world.any(stop.is_set)):
                self.watchdog.expect(f"step {self.place.step + 1:,}")
                if self.task.before_step is not None:
                    self.task.before_step(self.place.step)
                figures = self.step()
                if figures.verdict is Verdict.RESTORE:
                    since = _Since(self.place)
                    continue
                self._after_step(figures, report, since)
                report.stopped = self._stage_stops()
        if report.stopped:
            self.say(f"stopped at step {self.place.step:,}: {report.stopped}")
        self.watchdog.expect(None)
        self._finish(report, is_done=self.place.step >= self.total or report.stopped is not None)
        report.seconds = time.monotonic() - begin
        return report

    def begin(self, *, restart: bool = False) -> None:
        """Take up the newest whole checkpoint of the run folder, if there is one."""
        out = self.run.out
        if self.world.is_first:
            _make(out)
        if restart:
            self.checkpoints.remove_after(-1)
        found = self.checkpoints.newest()
        if found is not None:
            path, manifest = found
            _check_same_run(manifest["settings"], as_mapping(self.run), path)
            self._take_up(path, manifest)
            self.say(f"resuming {path.name}: {self.place.tokens:,} tokens were seen")
        if self.world.is_first:
            write_whole(out / "run.yaml", as_yaml(self.run).encode())
            self.metrics = MetricsLog(
                out, resume_at=self.place.step if found else None, tensorboard=self.run.log.tensorboard
            )

    def step(self) -> StepFigures:
        """One update, or a skipped one, or the way back to the last checkpoint."""
        rows = rows_at(self.place.position, self.run.batch, self.world.data_size)
        rate = self._set_schedules()
        torch.manual_seed((self.run.seed * SEED_STRIDE + self.place.step) * SEED_STRIDE + self.world.data_rank)
        self.module.train()
        timer = Timer(self.device)
        sums = self._forward_backward(rows, timer)
        count, tokens = sums["count"], int(sums["tokens"])
        watch = self.place.watch
        self._average_copies()
        factor = divided_by(self.world) * self._nominal(rows) / (max(count, 1.0) * watch.loss_scale)
        norms = gradient_norms(self.parameters, factor)
        loss = _mean(sums)
        verdict = watch.judge(loss, norms.total, self.run.stability, is_scaled=self.precision == "fp16")
        if verdict is Verdict.RESTORE and self._go_back(rows):
            return StepFigures(loss, count, tokens, rows, norms, rate, verdict, {}, timer.seconds)
        if verdict is not Verdict.SKIP:
            clip = self.run.optimizer.clip
            coefficient = min(1.0, clip / (norms.total + 1e-6)) if clip else 1.0
            scale_gradients(self.parameters.values(), factor * coefficient)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        timer.mark("optimizer")
        self.place.step += 1
        self.place.position += rows
        self.place.tokens += tokens
        self.place.loss_tokens += int(count)
        metrics = {n: sums[f"{n}/sum"] / sums[f"{n}/by"] for n in sums["names"] if sums[f"{n}/by"]}
        verdict = Verdict.STEP if verdict is Verdict.RESTORE else verdict
        return StepFigures(loss, count, tokens, rows, norms, rate, verdict, metrics, timer.seconds)

    def evaluate(self) -> dict[str, float]:
        """Mean loss of the held-out rows, and what the stage adds."""
        self.watchdog.expect(f"the evaluation after step {self.place.step:,}")
        figures: dict[str, float] = {}
        held_out, rows = self.task.held_out, self.run.evaluate.rows
        if held_out is not None and rows:
            figures = self._score(held_out, rows)
        if self.task.evaluate is not None:
            self.module.eval()
            with outside_forward(self.module):
                figures |= self.task.evaluate()
        return figures

    def save(self) -> None:
        """A checkpoint of this moment."""
        self.watchdog.expect(f"the checkpoint of step {self.place.step:,}")
        tensors = tensors_of(self.model, self.optimizer)
        self.checkpoints.save(self.place, tensors, as_mapping(self.run), self.task.on_checkpoint)
        self.saved_at = self.place.step

    # inside a step

    def _forward_backward(self, rows: int, timer: Timer) -> dict[str, Any]:
        """Backward of the loss sum over a fixed number, so that no dtype overflows; sums over all processes."""
        share = share_of(rows, self.world, self.run.batch.micro_rows)
        source, position = self.task.source, self.place.position
        spans = [(position + start, count) for start, count in share]
        collected = Collected(self.device)
        scale = self.place.watch.loss_scale / self._nominal(rows)
        for index, batch in enumerate(self.reader.batches(source, spans)):
            on_device = batch.to(self.device)
            timer.mark("data")
            with without_sum(self.module, is_last=index == len(spans) - 1):
                result: LossSum = self.module(on_device)
                (result.total * scale).backward()
            collected.add(result, batch.tokens)
            timer.mark("forward_backward")
        following = rows_at(position + rows, self.run.batch, self.world.data_size)
        if self.place.step + 1 < self.total:
            following_share = share_of(following, self.world, self.run.batch.micro_rows)
            self.reader.expect(source, [(position + rows + start, count) for start, count in following_share])
        return collected.summed(self.world)

    def _nominal(self, rows: int) -> float:
        """About the number of loss positions of a batch: a number that every process knows beforehand."""
        return float(rows * self.run.batch.length)

    def _set_schedules(self) -> float:
        stability, step = self.run.stability, self.place.step
        rate = self.run.optimizer.lr * learning_rate_factor(step, self.run.schedule, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        alpha = on_lines(step, stability.shrink_points, stability.embedding_shrink)
        self.hook.alpha = alpha * self.place.watch.shrink
        return rate

    def _average_copies(self) -> None:
        """Tensor parallel: parameters that every process has whole must not drift apart by rounding."""
        if self.world.tensor_size == 1:
            return
        from torch.distributed.tensor import DTensor, Shard

        group = self.world.mesh.get_group("tensor")
        for parameter in self.parameters.values():
            gradient = parameter.grad
            if gradient is None:
                continue
            if isinstance(gradient, DTensor):
                names = gradient.device_mesh.mesh_dim_names or ()
                shared = dict(zip(names, gradient.placements, strict=True)).get("tensor")
                if isinstance(shared, Shard):
                    continue
                gradient = gradient.to_local()
            torch.distributed.all_reduce(gradient, group=group)
            gradient.div_(self.world.tensor_size)

    def _go_back(self, rows: int) -> bool:
        """To the last checkpoint's weights, behind `skip_batches` batches of its data; False where there is none."""
        stability, now = self.run.stability, self.place
        self.checkpoints.wait()
        found = self.checkpoints.newest()
        if found is None:
            now.watch.restored(Watch(), stability)
            return False
        self.optimizer.zero_grad(set_to_none=True)
        path, manifest = found
        before = Place.from_mapping(manifest["place"])
        self.checkpoints.load(path, tensors_of(self.model, self.optimizer))
        now.watch.restored(before.watch, stability)
        before.position = max(before.position + stability.skip_batches * rows, now.position + rows)
        before.watch = now.watch
        self.say(
            f"spike at step {now.step:,}: back to step {before.step:,}, on with row {before.position:,}, "
            f"embedding gradient × {before.watch.shrink:g}"
        )
        self.place = before
        self.reader.forget()
        if self.metrics is not None:
            self.metrics.drop_after(before.step)
        return True

    # between steps

    def _stage_stops(self) -> str | None:
        return self.task.stops() if self.task.stops is not None else None

    def _after_step(self, figures: StepFigures, report: Report, since: _Since) -> None:
        run, step = self.run, self.place.step
        is_last = step >= self.total
        evaluation = {}
        if run.evaluate.every and (step % run.evaluate.every == 0 or is_last):
            evaluation = report.evaluation = self.evaluate()
        if step % run.log.every == 0 or is_last or evaluation:
            line = self._figures(figures, since) | evaluation
            report.losses.append((step, figures.loss))
            if self.metrics is not None:
                self.metrics.write(line)
            self.say(line_of(line, self.total))
            since.begin(self.place)
        if run.save.every and step % run.save.every == 0 and not is_last:
            self.save()

    def _figures(self, figures: StepFigures, since: _Since) -> dict[str, Any]:
        place, seconds = self.place, max(time.monotonic() - since.time, 1e-9)
        rate = (place.tokens - since.tokens) / seconds
        peak = peak_flops(self.device)
        needed = flops_per_token(self.task.glm.config, self.run.batch.length)
        line: dict[str, Any] = {"step": place.step, "loss": figures.loss, "lr": figures.lr, "norm": figures.norms.total}
        line |= {f"norm_{name}": value for name, value in figures.norms.parts.items()}
        line |= {"rows": place.position, "batch_rows": figures.rows, "tokens": place.tokens, "tokens_per_s": rate}
        line["padding"] = 1 - figures.tokens / (figures.rows * self.run.batch.length)
        line["mfu"] = None if peak is None else rate * needed / (peak * self.world.size)
        line |= {"alpha": self.hook.alpha, "nonfinite": place.watch.nonfinite, "restores": place.watch.restores}
        if self.precision == "fp16":
            line["loss_scale"] = place.watch.loss_scale
        if self.device.type == "cuda":
            line["memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        line |= {f"seconds_{name}": value for name, value in figures.seconds.items()}
        return line | figures.metrics

    def _finish(self, report: Report, *, is_done: bool) -> None:
        """The last checkpoint, the last evaluation, the model."""
        place = self.place
        self.checkpoints.wait()
        if self.saved_at != place.step:
            self.save()
        self.checkpoints.wait()
        if is_done and not report.evaluation:
            report.evaluation = self.evaluate()
        self.watchdog.expect(None)
        if is_done and self.run.export.enabled:
            report.model = self._export()
        report.step, report.tokens, report.finished = place.step, place.tokens, is_done
        report.nonfinite, report.restores = place.watch.nonfinite, place.watch.restores

    def _export(self) -> Path:
        target = self.run.out / "model"
        if self.task.exported is not None:
            self.task.exported(target)
        else:
            export(self.task.glm, target, self.run, self.world, self.precision)
        return target

    def _take_up(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.checkpoints.load(path, tensors_of(self.model, self.optimizer))
        self.place = Place.from_mapping(manifest["place"])
        self.saved_at = self.place.step
        self.checkpoints.remove_after(self.place.step)
        if self.task.on_resume is not None:
            self.task.on_resume(path)

    @torch.no_grad()
    def _score(self, source: Source, rows: int) -> dict[str, float]:
        """Loss of rows, and the stage's further numbers, each under `evaluation_…`."""
        self.module.eval()
        unit = self.world.data_size
        collected = Collected(self.device)
        for start, count in share_of(max(unit, rows // unit * unit), self.world, self.run.batch.micro_rows):
            batch = source.batch(start, count)
            collected.add(self.module(batch.to(self.device)), batch.tokens)
        sums = collected.summed(self.world)
        means = {name: sums[f"{name}/sum"] / sums[f"{name}/by"] for name in sums["names"] if sums[f"{name}/by"]}
        return {f"evaluation_{name}": value for name, value in {"loss": _mean(sums), **means}.items()}

    def _total_steps(self) -> int:
        run = self.run
        if run.steps is not None:
            return run.steps
        rows = self.task.source.rows_per_epoch
        if rows is None or run.epochs is None:
            raise TrainingError("`epochs` needs data with an end", cure="give `steps` instead")
        return steps_for(math.ceil(rows * run.epochs), run.batch, self.world.data_size)


class _Since:
    """When the last line was logged."""

    def __init__(self, place: Place) -> None:
        self.begin(place)

    def begin(self, place: Place) -> None:
        self.time, self.tokens = time.monotonic(), place.tokens


def _mean(sums: Mapping[str, Any]) -> float:
    return float(sums["loss"] / max(sums["count"], 1.0))


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"the run folder {out} cannot be made ({error.strerror})", cure="--out DIR") from error


def _in_fp32(model: nn.Module) -> nn.Module:
    """Parameters that learn are fp32 masters; frozen ones stay as they are."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return model


_IDENTITY = ("seed", "model", "method", "data", "batch.length")


def _check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raises TrainingError where going on would be another run."""
    flat = [{**settings, "batch.length": settings["batch"]["length"]} for settings in (before, now)]
    for key in _IDENTITY:
        old, new = (settings.get(key) for settings in flat)
        if old != new:
            raise TrainingError(
                f"{path} was made with `{key}` {old}, now it is {new}",
                cure="take the old value, give another `out`, or --restart to begin anew",
            )
