"""When a run skips a step, goes back, or gives up; and the loss scale of fp16."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chatglm.errors import TrainingError
from chatglm.training.loop import train
from chatglm.training.loss import LossSum, batch_loss
from chatglm.training.run_config import StabilitySettings
from chatglm.training.samples import Batch
from chatglm.training.stability import Verdict, Watch
from chatglm.training.state import checkpoints
from tiny_runs import CONFIG, is_equal, tiny_run, tiny_task, trained_weights, weights

SETTINGS = StabilitySettings(window=20, min_history=10, loss_scale_window=4)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def calm_watch(**values: Any) -> Watch:
    """After 20 steps of loss 2 and norm 1."""
    return Watch(losses=[2.0] * 20, norms=[1.0] * 20, **values)


def judge(watch: Watch, loss: float = 2.0, norm: float = 1.0, *, is_scaled: bool = False) -> Verdict:
    return watch.judge(loss, norm, SETTINGS, is_scaled=is_scaled)


def test_four_high_norms_are_borne_and_the_fifth_is_a_spike() -> None:
    watch = calm_watch()
    assert [judge(watch, norm=10.5) for _ in range(5)] == [Verdict.STEP] * 4 + [Verdict.RESTORE]


def test_a_normal_norm_in_between_starts_the_count_again() -> None:
    watch = calm_watch()
    verdicts = [judge(watch, norm=norm) for norm in (10.5, 10.5, 10.5, 10.5, 1.0, 10.5, 10.5, 10.5, 10.5)]
    assert verdicts == [Verdict.STEP] * 9


def test_high_norms_do_not_raise_the_median_that_they_are_measured_by() -> None:
    watch = calm_watch()
    for _ in range(4):
        judge(watch, norm=11)
    assert max(watch.norms) == 1.0


def test_a_loss_above_one_and_a_half_medians_is_a_spike_at_once() -> None:
    assert judge(calm_watch(), loss=2.99) is Verdict.STEP
    assert judge(calm_watch(), loss=3.01) is Verdict.RESTORE


def test_there_is_no_verdict_before_enough_was_seen() -> None:
    watch = Watch(losses=[2.0] * 9, norms=[1.0] * 9)
    assert judge(watch, loss=100, norm=1000) is Verdict.STEP


def test_either_rule_can_be_switched_off() -> None:
    off = replace(SETTINGS, norm_factor=0.0, loss_factor=0.0)
    watch = calm_watch()
    assert {watch.judge(100, 1000, off, is_scaled=False) for _ in range(8)} == {Verdict.STEP}


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf), (math.inf, math.nan)])
def test_non_finite_figures_skip_the_step_and_are_counted(loss: float, norm: float) -> None:
    watch = calm_watch()
    assert judge(watch, loss, norm) is Verdict.SKIP and watch.nonfinite == 1
    assert judge(watch) is Verdict.STEP and (watch.nonfinite, watch.nonfinite_run) == (1, 0)


def test_twenty_non_finite_steps_in_a_row_end_the_run() -> None:
    watch = calm_watch()
    for _ in range(19):
        judge(watch, norm=math.nan)
    with pytest.raises(TrainingError, match="not finite in 20 steps in a row"):
        judge(watch, norm=math.nan)


def test_the_loss_scale_is_halved_from_the_second_overflow_and_doubled_after_its_window() -> None:
    watch = Watch(loss_scale=65536.0)
    scales = []
    for norm in (math.inf, math.inf, math.inf, 1, 1, 1, 1, math.inf, math.inf):
        judge(watch, norm=norm, is_scaled=True)
        scales.append(watch.loss_scale)
    assert scales == [65536, 32768, 16384, 16384, 16384, 16384, 32768, 32768, 16384]


def test_the_loss_scale_never_falls_below_one() -> None:
    watch = Watch(loss_scale=2.0)
    for _ in range(5):
        judge(watch, norm=math.inf, is_scaled=True)
    assert watch.loss_scale == 1.0


def test_more_spikes_than_allowed_end_the_run_with_what_to_change() -> None:
    watch = calm_watch()
    for expected in (0.5, 0.25, 0.125):
        watch.restored(Watch(), SETTINGS)
        assert watch.shrink == expected
    with pytest.raises(
        TrainingError, match=r"spiked 4 times; `stability.max_restores` is 3\n  cure: lower optimizer.lr"
    ):
        watch.restored(Watch(), SETTINGS)


def test_what_is_remembered_survives_a_checkpoint() -> None:
    watch = calm_watch(high_norms=3, restores=1, shrink=0.5, loss_scale=4096.0)
    assert Watch.from_mapping(json.loads(json.dumps(watch.as_mapping()))) == watch


# in the loop


class Poisoned:
    """The loss of the tiny task, multiplied for the batches that begin with certain rows of the stream."""

    def __init__(self, factors: dict[int, float]) -> None:
        self.factors = factors
        self.seen: list[int] = []

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        row = int(batch.ids[0, 0])  # see marked()
        marked = replace(batch, ids=batch.ids.clamp(max=CONFIG.vocab_size - 1))
        loss = batch_loss(model, marked)  # type: ignore[arg-type]
        if not model.training:
            return loss
        self.seen.append(row - 1000)
        factor = self.factors.get(row - 1000, 1.0)
        return LossSum(loss.total * factor, loss.count)


class Marked:
    """The tiny task's rows, each batch marked with its first row's number in its first id."""

    rows_per_epoch = None

    def __init__(self, source: Any) -> None:
        self.source = source

    def batch(self, start: int, count: int) -> Batch:
        batch: Batch = self.source.batch(start, count)
        ids = batch.ids.clone()
        ids[0, 0] = 1000 + start
        return replace(batch, ids=ids)


def poisoned(factors: dict[int, float], out: Path, **sections: Any) -> tuple[Any, Any, Poisoned]:
    task = tiny_task()
    task.loss = loss = Poisoned(factors)
    task.source = Marked(task.source)
    stability = {"window": 10, "min_history": 5, "skip_batches": 3, **sections.pop("stability", {})}
    run = tiny_run(out, batch={"micro_rows": 8}, save={"every": 5}, stability=stability, **sections)
    return train(task, run), task, loss


def test_a_spike_goes_back_to_the_checkpoint_and_over_the_data(tmp_path: Path) -> None:
    report, _, loss = poisoned({8 * 11: 20.0}, tmp_path)
    assert report.restores == 1 and report.finished and report.step == 20
    assert loss.seen[:12] == [8 * step for step in range(12)]  # the twelfth batch spikes
    assert loss.seen[12:15] == [8 * 13, 8 * 14, 8 * 15]  # from the weights of step 10, three batches further on
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["alpha"] for line in lines] == [1.0] * 10 + [0.5] * 10
    assert all(line["loss"] < 6 for line in lines)


def test_no_data_before_the_spike_is_read_again_where_the_checkpoint_is_far_behind(tmp_path: Path) -> None:
    _, _, loss = poisoned({8 * 9: 20.0}, tmp_path, stability={"skip_batches": 1})
    assert loss.seen[9:11] == [8 * 9, 8 * 10]


def test_a_run_that_spiked_is_resumed_bitwise(tmp_path: Path) -> None:
    whole, task, _ = poisoned({8 * 11: 20.0}, tmp_path / "whole")
    for path in checkpoints(tmp_path / "whole"):
        if path.name in ("step-000015", "step-000020"):
            path.rename(path.with_name(f"old-{path.name}"))
    poisoned({}, tmp_path / "other")  # another run, so that nothing but the checkpoint can help
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "old-step-000015").rename(tmp_path / "part" / "step-000015")
    part, resumed, _ = poisoned({8 * 11: 20.0}, tmp_path / "part")
    assert part.restores == whole.restores == 1
    assert is_equal(weights(resumed), weights(task))


def test_a_spike_before_the_first_checkpoint_is_stepped_over_with_half_the_embedding_gradient(tmp_path: Path) -> None:
    task = tiny_task()
    task.loss = Poisoned({8 * 7: 20.0})
    task.source = Marked(task.source)
    stability = {"window": 10, "min_history": 5}
    run = tiny_run(tmp_path, batch={"micro_rows": 8}, save={"every": 0}, stability=stability)
    report = train(task, run)
    assert report.restores == 1 and report.step == 20
    last = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["alpha"] == 0.5


def test_a_run_that_keeps_spiking_gives_up(tmp_path: Path) -> None:
    factors = {8 * batch: 20.0 for batch in range(8, 200)}
    with pytest.raises(TrainingError, match="spiked 4 times"):
        poisoned(factors, tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_batch_leaves_every_weight_finite_and_is_counted(bad: float, tmp_path: Path) -> None:
    report, task, _ = poisoned({8 * 11: bad}, tmp_path, steps=12)
    assert report.nonfinite == 1 and report.step == 12
    assert all(bool(tensor.isfinite().all()) for tensor in weights(task).values())


def test_a_skipped_step_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    constant = {"kind": "constant"}
    _, skipped, _ = poisoned({8 * 11: math.nan}, tmp_path / "bad", steps=12, schedule=constant)
    _, shorter, _ = poisoned({}, tmp_path / "good", steps=11, schedule=constant)
    assert is_equal(weights(skipped), weights(shorter))


def test_fp16_scales_the_loss_and_learns_as_fp32_does_on_a_cpu(tmp_path: Path) -> None:
    """A CPU has no fp16 arithmetic, so only the scale is at work: powers of two, undone before the step."""
    scaled, _ = trained_weights(tmp_path / "fp16", compute={"precision": "fp16"})
    plain, _ = trained_weights(tmp_path / "fp32")
    pairs = zip(scaled.losses, plain.losses, strict=True)
    assert max(abs(one - other) for (_, one), (_, other) in pairs) < 2e-3  # the embedding's output is rounded to fp16
    last = json.loads((tmp_path / "fp16" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["loss_scale"] == 65536.0


def test_bf16_activations_learn_nearly_as_fp32_and_the_masters_stay_fp32(tmp_path: Path) -> None:
    narrow, state = trained_weights(tmp_path / "bf16", compute={"precision": "bf16"})
    plain, _ = trained_weights(tmp_path / "fp32")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert abs(narrow.loss - plain.loss) < 0.05
    assert narrow.loss != plain.loss


def test_the_embedding_gets_its_share_of_the_gradient_and_the_tied_head_all_of_it() -> None:
    from chatglm.training.preparing import InputEmbedding

    hook = InputEmbedding(torch.float32)
    table = nn.Embedding(4, 3)
    table.register_forward_hook(hook)
    gradients = []
    for alpha in (1.0, 0.1):
        hook.alpha = alpha
        table.weight.grad = None
        hidden = table(torch.tensor([2]))
        torch.testing.assert_close(hidden, table.weight[2:3])
        (hidden.sum() + 5 * table.weight[2].sum()).backward()
        assert table.weight.grad is not None
        gradients.append(float(table.weight.grad[2, 0]))
    assert gradients == pytest.approx([6.0, 5.1])
