"""Models that are shared out while they are empty: each process fills its own part, and all is as with one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.checkpoint import open_checkpoint, save
from chatglm.checkpoint.reading import read_tensor
from chatglm.errors import CheckpointError
from chatglm.model import GLM, initialize
from chatglm.quantization import swap_as_described
from chatglm.training import filling
from chatglm.training.filling import empty_model, fill, is_shared_out
from chatglm.training.loop import train
from chatglm.training.loss import batch_loss
from chatglm.training.methods import tuned
from chatglm.training.optimizer import gradient_norms, trained
from chatglm.training.run_config import ModelSettings, RunConfig
from chatglm.training.starting import starting_model
from chatglm.training.task import ListSource, Task
from tiny_runs import CONFIG, LENGTH, ROWS, tiny_run
from two_processes import in_two_processes

TOLERANCE = 1e-6
SOURCES = ("floats", "codes", "drawn")
PAIRS = ("floats-fsdp", "floats-tensor", "floats-ddp", "codes-fsdp", "drawn-fsdp", "drawn-tensor")
WAYS: dict[str, dict[str, Any]] = {
    "fsdp": {"strategy": "fsdp"},
    "tensor": {"tensor": 2},
    "ddp": {"strategy": "ddp"},
}


def settings_of(folder: Path, source: str) -> ModelSettings:
    if source == "drawn":
        sizes = {name: getattr(CONFIG, name) for name in ("vocab_size", "hidden_size", "num_layers", "num_heads")}
        sizes |= {"inner_hidden_size": 64, "max_sequence_length": 64, "bos_token_id": 94, "eos_token_id": 95}
        return ModelSettings(config={**sizes, "mask_token_id": 90, "gmask_token_id": 91})
    return ModelSettings(source=str(folder / source))


def run_of(folder: Path, source: str, way: str) -> RunConfig:
    settings = settings_of(folder, source)
    model = {"source": settings.source, "config": dict(settings.config)}
    return tiny_run(
        folder / f"{source}-{way}",
        steps=3,
        model=model,
        schedule={"warmup": 0},
        save={"every": 0},
        evaluate={"rows": 0},
        parallel=WAYS.get(way, {}),
        optimizer={"lr": 1e-3},
    )


def trained_from(folder: Path, source: str, way: str) -> dict[str, Any]:
    """Losses of a run, whether it began empty, and the most numbers that one process kept of the parameters."""
    run = run_of(folder, source, way)
    made = tuned(run, may_be_empty=True)
    is_empty = any(parameter.is_meta for parameter in made.model.parameters())
    held: list[int] = []

    def note(step: int) -> None:
        local = [getattr(p, "_local_tensor", p) for p in trained(made.model).values()]
        held.append(sum(tensor.untyped_storage().nbytes() // 4 for tensor in local))

    task = Task(made.model, batch_loss, ListSource(ROWS, LENGTH), fill=made.fill, before_step=note)
    report = train(task, run)
    return {"losses": report.losses, "is_empty": is_empty, "held": max(held)}


def work(rank: int, folder: Path) -> None:
    told = {pair: trained_from(folder, *pair.split("-")) for pair in PAIRS}
    (folder / f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of floats, and one of INT8 codes."""
    made = tmp_path_factory.mktemp("filling")
    model = GLM(CONFIG)
    initialize(model, 3)
    save(made / "floats", model.half().state_dict(), CONFIG)
    wanted = CONFIG.quantized(8, None)
    packed = swap_as_described(model.float(), wanted)
    save(made / "codes", packed.state_dict(), wanted)
    return made


@pytest.fixture(scope="module")
def told(folder: Path) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    alone = {source: trained_from(folder, source, "alone") for source in SOURCES}
    in_two_processes(work, folder)
    two = [json.loads((folder / f"told-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    yield {"alone": alone, "two": two}


@pytest.mark.parametrize("pair", PAIRS)
def test_losses_are_those_of_one_process_wherever_the_weights_come_from(told: dict[str, Any], pair: str) -> None:
    alone = dict(told["alone"][pair.split("-")[0]]["losses"])
    for process in told["two"]:
        together = dict(process[pair]["losses"])
        assert list(together) == list(alone) == [1, 2, 3]
        assert max(abs(alone[step] - together[step]) for step in alone) < TOLERANCE


@pytest.mark.parametrize("source", SOURCES)
def test_under_fsdp_a_process_begins_empty_and_holds_its_half_alone(told: dict[str, Any], source: str) -> None:
    whole = told["alone"][source]["held"]
    assert not told["alone"][source]["is_empty"]
    first, second = (process[f"{source}-fsdp"] for process in told["two"])
    assert first["is_empty"] and second["is_empty"]
    assert first["held"] + second["held"] == whole and 0.45 < first["held"] / whole < 0.55


def test_tensor_parallel_begins_empty_too_and_whole_copies_do_not(told: dict[str, Any]) -> None:
    for process in told["two"]:
        for source in ("floats", "drawn"):
            shared = process[f"{source}-tensor"]
            assert shared["is_empty"] and shared["held"] < 0.6 * told["alone"][source]["held"]
        assert not process["floats-ddp"]["is_empty"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_filled_model_has_every_bit_of_a_loaded_one(folder: Path, source: str) -> None:
    settings = settings_of(folder, source)
    model = empty_model(settings)
    assert all(parameter.is_meta for parameter in model.parameters())
    filling.give_memory(model, [model], torch.device("cpu"))
    fill(model, settings, seed=0)
    wanted = starting_model(settings, 0)
    assert model.state_dict().keys() == wanted.state_dict().keys()
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    for (name, value), other in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_one_tensor_at_a_time_is_kept_of_a_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(folder, "floats")
    model = empty_model(settings)
    filling.give_memory(model, [model], torch.device("cpu"))
    kept: list[int] = []
    monkeypatch.setattr(filling, "keep_own_part", lambda place, value: kept.append(value.nbytes))
    whole = sum(read_tensor(entry).nbytes for entry in open_checkpoint(folder / "floats").tensors.values())
    fill(model, settings, seed=0)
    assert len(kept) == len(dict(model.named_parameters())) and sum(kept) == whole


def test_a_checkpoint_that_does_not_fit_is_told_as_ever(folder: Path, tmp_path: Path) -> None:
    state = {name: read_tensor(entry) for name, entry in open_checkpoint(folder / "floats").tensors.items()}
    del state["transformer.layers.1.mlp.dense_h_to_4h.bias"]
    save(tmp_path / "short", state, CONFIG)
    settings = ModelSettings(source=str(tmp_path / "short"))
    model = empty_model(settings)
    filling.give_memory(model, [model], torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"lacks `transformer.layers.1.mlp.dense_h_to_4h.bias`"):
        fill(model, settings, seed=0)


def test_one_process_and_whole_copies_load_as_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(folder, "floats", "fsdp")
    assert not is_shared_out(run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_shared_out(run) and not is_shared_out(run_of(folder, "floats", "ddp"))


def test_a_gradient_in_strides_counts_on_both_axes_of_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP over tensor parallel: every axis that holds parts has to be summed over, or norm and clipping are wrong."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
        rows = [_StridedShard(0, split_factor=2), Shard(0)]  # as of a (2, 2) mesh
        weight = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, rows, run_check=False))
        weight.grad = torch.ones_like(weight)
        summed: list[object] = []
        reduce = torch.distributed.all_reduce

        def noted(tensor: torch.Tensor, group: object = None) -> None:
            summed.append(group)
            reduce(tensor, group=group)

        monkeypatch.setattr(torch.distributed, "all_reduce", noted)
        assert gradient_norms({"weight": weight}).total == pytest.approx(4)
        assert summed == [mesh.get_group("data"), mesh.get_group("tensor")]
    finally:
        torch.distributed.destroy_process_group()
