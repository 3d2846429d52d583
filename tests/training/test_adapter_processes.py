"""Adapters over a frozen base by two processes: the losses and the folder of one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_adapters import adapter_run

from chatglm.checkpoint import open_checkpoint
from chatglm.checkpoint.reading import read_tensor
from chatglm.training.loop import train
from chatglm.training.loss import batch_loss
from chatglm.training.methods import tuned
from chatglm.training.task import ListSource, Task
from checkpoint_folders import small_safetensors
from tiny_runs import LENGTH, ROWS
from two_processes import in_two_processes

pytest.importorskip("peft")

TOLERANCE = 1e-6
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 4, "targets": ["query_key_value", "dense_4h_to_h"]},
    "qlora": {"name": "qlora", "r": 4, "bits": 4},
    "ptuning": {"name": "ptuning", "pre_seq_len": 4},
    "ptuning-int8": {"name": "ptuning", "pre_seq_len": 4, "bits": 8, "prefix_projection": True},
}
PAIRS = ("lora-auto", "qlora-auto", "ptuning-auto", "ptuning-int8-auto", "lora-fsdp")


def losses_of(folder: Path, name: str, strategy: str, precision: str = "fp32") -> list[Any]:
    run = adapter_run(
        folder / "base",
        folder / f"{name}-{strategy}",
        METHODS[name],
        steps=4,
        save={"every": 0},
        evaluate={"rows": 0},
        compute={"threads": 1, "precision": precision},
        parallel={} if strategy == "alone" else {"strategy": strategy},
    )
    made = tuned(run)
    if name.startswith("ptuning"):
        made.glm.transformer.prefix_encoder.dropout.p = 0.0  # every process draws its own
    report = train(Task(made.model, batch_loss, ListSource(ROWS, LENGTH), exported=made.exported), run)
    return report.losses


def work(rank: int, folder: Path) -> None:
    told = {pair: losses_of(folder, *pair.rsplit("-", 1)) for pair in PAIRS}
    (folder / f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder of all runs, and their losses."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("adapter-processes")
    small_safetensors(folder / "base", dtype=torch.float32)
    told = {f"{name}-alone": losses_of(folder, name, "alone") for name in METHODS}
    in_two_processes(work, folder)
    for rank in (1, 0):
        told |= json.loads((folder / f"told-{rank}.json").read_text(encoding="utf-8"))
    yield folder, told


@pytest.mark.parametrize("pair", PAIRS)
def test_two_processes_have_the_losses_of_one(runs: tuple[Path, dict[str, Any]], pair: str) -> None:
    _, told = runs
    alone, together = dict(told[pair.rsplit("-", 1)[0] + "-alone"]), dict(told[pair])
    assert list(alone) == list(together) == [1, 2, 3, 4]
    assert max(abs(alone[step] - together[step]) for step in alone) < TOLERANCE
    assert alone[1] != alone[4]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_folder_of_the_adapter_is_that_of_one_process(runs: tuple[Path, dict[str, Any]], pair: str) -> None:
    folder, _ = runs
    one, two = (tensors_of(folder / name / "model") for name in (pair.rsplit("-", 1)[0] + "-alone", pair))
    assert one.keys() == two.keys() and one
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-3)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of an adapter's folder, or a prefix's."""
    if (folder / "adapter_model.safetensors").exists():
        return load_file(folder / "adapter_model.safetensors")
    return {name: read_tensor(entry) for name, entry in open_checkpoint(folder).tensors.items()}
