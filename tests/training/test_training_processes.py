"""One process, two with data parallel (DDP, FSDP), two with tensor parallel: the same run, the same checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.checkpoint import open_checkpoint
from chatglm.checkpoint.reading import read_tensor
from chatglm.errors import TrainingError
from chatglm.training.loop import train
from chatglm.training.task import Task
from tiny_runs import is_equal, tiny_run, tiny_task, trained_weights, weights
from two_processes import in_two_processes

TOLERANCE = 1e-6
"""On the loss, over 20 steps in fp32: sums of two processes are rounded elsewhere."""

SHORT: dict[str, Any] = {"steps": 6, "schedule": {"warmup": 2}}

WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": {"strategy": "ddp"}, "export": {"enabled": True, "dtype": "fp32"}},
    "fsdp": {
        "parallel": {"strategy": "fsdp"},
        "export": {"enabled": True, "dtype": "fp32"},
        "save": {"background": True},
    },
    "fsdp-bf16": {"parallel": {"strategy": "fsdp"}, "compute": {"precision": "bf16"}} | SHORT,
    "frozen-layer": SHORT,
    "tensor": {"parallel": {"tensor": 2}, "export": {"enabled": True, "dtype": "fp32"}},
    "resumed-alone-fsdp": {"parallel": {"strategy": "fsdp"}},
    "resumed-alone-tensor": {"parallel": {"tensor": 2}},
}


def task_of(name: str) -> Task:
    """The tiny task; of `frozen-layer` the first layer does not learn, as with an adapter."""
    task = tiny_task()
    if name.startswith("frozen-layer"):
        task.glm.transformer.layers[0].requires_grad_(False)
    return task


def work(rank: int, folder: Path) -> None:
    """One of two processes: every way in turn, in one group."""
    for name, sections in WAYS.items():
        report = train(task_of(name), tiny_run(folder / name, **sections))
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps([report.losses, report.evaluation]), encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of all runs: `alone`, and those of two processes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("processes")
    alone = {"export": {"enabled": True, "dtype": "fp32"}}
    report, _ = trained_weights(folder / "alone", **alone)
    (folder / "alone.json").write_text(json.dumps([report.losses, report.evaluation]), encoding="utf-8")
    for name, sections in (("frozen-layer-alone", SHORT), ("bf16-alone", {"compute": {"precision": "bf16"}} | SHORT)):
        report = train(task_of(name), tiny_run(folder / name, **sections))
        (folder / f"{name}.json").write_text(json.dumps([report.losses, report.evaluation]), encoding="utf-8")
    for name in ("resumed-alone-fsdp", "resumed-alone-tensor"):
        shutil.copytree(folder / "alone", folder / name)
        shutil.rmtree(folder / name / "step-000020")
    in_two_processes(work, folder)
    yield folder


def losses(folder: Path, name: str) -> dict[int, float]:
    return dict(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))[0])


def metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tensor"])
def test_two_processes_have_the_losses_of_one_over_20_steps(runs: Path, name: str) -> None:
    alone, together = losses(runs, "alone"), losses(runs, name)
    assert list(together) == list(range(1, 21)) == list(alone)
    assert max(abs(alone[step] - together[step]) for step in alone) < TOLERANCE


def test_a_partly_frozen_model_is_trained_by_two_processes_as_by_one(runs: Path) -> None:
    alone, together = losses(runs, "frozen-layer-alone"), losses(runs, "frozen-layer")
    assert max(abs(alone[step] - together[step]) for step in alone) < TOLERANCE
    assert alone[6] != losses(runs, "alone")[6]


def test_two_processes_in_bf16_begin_as_one_and_stay_near(runs: Path) -> None:
    """Rounding of weights and activations is the same; a bf16 gradient summed elsewhere moves the last bits."""
    alone, together = losses(runs, "bf16-alone"), losses(runs, "fsdp-bf16")
    assert abs(alone[1] - together[1]) < 1e-5
    assert max(abs(alone[step] - together[step]) for step in alone) < 0.02


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tensor"])
def test_two_processes_have_the_gradient_norms_of_one(runs: Path, name: str) -> None:
    for one, two in zip(metrics(runs, "alone"), metrics(runs, name), strict=True):
        for part in ("norm", "norm_embedding", "norm_layer_0", "norm_others"):
            assert two[part] == pytest.approx(one[part], rel=1e-5)
        assert one["tokens"] == two["tokens"] and one["rows"] == two["rows"]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tensor"])
def test_held_out_rows_score_alike(runs: Path, name: str) -> None:
    scores = [
        json.loads((runs / f"{which}.json").read_text(encoding="utf-8"))[1]["evaluation_loss"]
        for which in ("alone", name)
    ]
    assert abs(scores[0] - scores[1]) < TOLERANCE


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tensor"])
def test_the_exported_model_is_whole(runs: Path, name: str) -> None:
    one, two = (open_checkpoint(runs / which / "model") for which in ("alone", name))
    assert one.config == two.config and one.tensors.keys() == two.tensors.keys()
    for key, entry in one.tensors.items():
        torch.testing.assert_close(read_tensor(two.tensors[key]), read_tensor(entry), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["resumed-alone-fsdp", "resumed-alone-tensor"])
def test_two_processes_go_on_with_the_checkpoint_of_one(runs: Path, name: str) -> None:
    alone, resumed = losses(runs, "alone"), losses(runs, name)
    assert list(resumed) == list(range(11, 21))
    assert max(abs(alone[step] - resumed[step]) for step in resumed) < TOLERANCE


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tensor"])
def test_one_process_goes_on_with_the_checkpoint_of_two(runs: Path, name: str, tmp_path: Path) -> None:
    shutil.copytree(runs / name / "step-000010", tmp_path / "step-000010")
    report, _ = trained_weights(tmp_path)
    together = losses(runs, name)
    assert [step for step, _ in report.losses] == list(range(11, 21))
    assert max(abs(together[step] - loss) for step, loss in report.losses) < TOLERANCE


def test_resuming_on_the_other_world_keeps_every_bit_of_the_state(runs: Path, tmp_path: Path) -> None:
    """No step is taken: what two processes wrote is what one reads, and what both export."""
    shutil.copytree(runs / "fsdp" / "step-000020", tmp_path / "step-000020")
    task = tiny_task(seed=7)
    train(task, tiny_run(tmp_path))
    written = open_checkpoint(runs / "fsdp" / "model").tensors
    read = {name: tensor for name, tensor in weights(task).items() if name in written}
    assert is_equal(read, {name: read_tensor(entry) for name, entry in written.items()})


def test_groups_of_tensor_parallel_that_do_not_divide_the_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"1 processes cannot be divided into groups of `parallel.tensor` 2"):
        train(tiny_task(), tiny_run(tmp_path, parallel={"tensor": 2}))
