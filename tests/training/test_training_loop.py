"""The loop: what it learns, that it repeats itself, and that how a batch is divided does not matter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.errors import TrainingError
from chatglm.training.loop import train
from tiny_runs import is_equal, tiny_run, tiny_task, trained_weights, weights


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained_weights(tmp_path_factory.mktemp("whole"))


def losses(report: Any) -> list[float]:
    return [loss for _, loss in report.losses]


def largest_difference(one: Any, other: Any) -> float:
    pairs = zip(losses(one), losses(other), strict=True)
    return max(abs(first - second) for first, second in pairs)


def test_training_lowers_the_loss_on_rows_it_sees_and_on_rows_it_does_not(uninterrupted: Any) -> None:
    report, _ = uninterrupted
    assert losses(report)[-1] < 0.8 * losses(report)[0]
    assert report.evaluation["evaluation_loss"] < losses(report)[0]
    assert report.finished and report.step == 20


def test_two_runs_of_one_seed_are_bitwise_equal(uninterrupted: Any, tmp_path: Path) -> None:
    report, state = trained_weights(tmp_path)
    assert losses(report) == losses(uninterrupted[0])
    assert is_equal(state, uninterrupted[1])


def test_a_run_resumed_from_its_checkpoint_is_bitwise_the_uninterrupted_one(uninterrupted: Any, tmp_path: Path) -> None:
    trained_weights(tmp_path)
    shutil.rmtree(tmp_path / "step-000020")
    task = tiny_task(seed=5)  # other weights: all must come from the checkpoint
    report = train(task, tiny_run(tmp_path))
    assert losses(report) == losses(uninterrupted[0])[10:]
    assert is_equal(weights(task), uninterrupted[1])


def test_metrics_of_a_resumed_run_hold_every_step_once(tmp_path: Path) -> None:
    trained_weights(tmp_path)
    shutil.rmtree(tmp_path / "step-000020")
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 21, "lo')  # cut by a kill
    train(tiny_task(), tiny_run(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))


def test_four_micro_batches_equal_one(uninterrupted: Any, tmp_path: Path) -> None:
    one, _ = trained_weights(tmp_path / "one", batch={"micro_rows": 8})
    four, _ = trained_weights(tmp_path / "four", batch={"micro_rows": 2})
    assert largest_difference(one, four) < 1e-6  # fp32 sums in another order


def test_activation_checkpointing_does_not_change_the_run(uninterrupted: Any, tmp_path: Path) -> None:
    report, state = trained_weights(tmp_path, compute={"checkpointing": True})
    assert losses(report) == losses(uninterrupted[0])
    assert is_equal(state, uninterrupted[1])


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    _, before = trained_weights(tmp_path)
    task = tiny_task()
    report = train(task, tiny_run(tmp_path))
    assert report.losses == [] and report.finished
    assert is_equal(weights(task), before)


def test_more_steps_go_on_with_a_finished_run(tmp_path: Path) -> None:
    trained_weights(tmp_path, schedule={"kind": "constant"})
    report, _ = trained_weights(tmp_path, schedule={"kind": "constant"}, steps=25)
    assert [step for step, _ in report.losses] == list(range(21, 26))


def test_another_seed_in_the_same_folder_is_refused_with_both_values(tmp_path: Path) -> None:
    trained_weights(tmp_path, steps=6)
    with pytest.raises(TrainingError, match=r"made with `seed` 0, now it is 3"):
        train(tiny_task(), tiny_run(tmp_path, seed=3))


def test_a_run_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainingError, match=r"the run folder .*file/out cannot be made \(Not a directory\)"):
        train(tiny_task(), tiny_run(tmp_path / "file" / "out"))


def test_restart_begins_anew(uninterrupted: Any, tmp_path: Path) -> None:
    trained_weights(tmp_path, seed=3, steps=6)
    task = tiny_task()
    report = train(task, tiny_run(tmp_path), restart=True)
    assert losses(report) == losses(uninterrupted[0])
    assert is_equal(weights(task), uninterrupted[1])
