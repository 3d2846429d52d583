"""Compiled or not, packed or not, forecast and measured: the same figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.errors import TrainingError
from chatglm.model import GLM, initialize
from chatglm.training.attending import attend_for
from chatglm.training.forecast import activation_bytes, forecast, lines_of
from chatglm.training.loop import train
from chatglm.training.loss import hidden_states
from chatglm.training.metrics import flops_per_token
from chatglm.training.optimizer import make_optimizer
from chatglm.training.run_config import RunConfig
from chatglm.training.samples import collate, pack
from chatglm.training.state import tensors_of
from chatglm.training.task import ListSource
from tiny_runs import CONFIG, LENGTH, ROWS, tiny_run, tiny_task, trained_weights

DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
"""The compiler looks at every attribute of what it traces."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def largest_difference(one: Any, other: Any) -> float:
    pairs = zip(one.losses, other.losses, strict=True)
    return max(abs(first - second) for (_, first), (_, second) in pairs)


@DYNAMO
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path: Path) -> None:
    """Traced and differentiated ahead of time; the C++ compiler of inductor would take longer than all other tests."""
    eager, _ = trained_weights(tmp_path / "eager")
    compiled, _ = trained_weights(tmp_path / "compiled", compute={"compile": True, "compile_backend": "aot_eager"})
    torch._dynamo.reset()
    assert largest_difference(eager, compiled) < 1e-5


@DYNAMO
def test_a_compiled_run_may_checkpoint_activations(tmp_path: Path) -> None:
    compute = {"compile": True, "compile_backend": "aot_eager", "checkpointing": True}
    eager, _ = trained_weights(tmp_path / "eager", steps=4, schedule={"warmup": 1})
    compiled, _ = trained_weights(tmp_path / "compiled", steps=4, schedule={"warmup": 1}, compute=compute)
    torch._dynamo.reset()
    assert largest_difference(eager, compiled) < 1e-5


def test_an_unknown_compiler_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"`compute.compile_backend` is 'inductr'; known: .*inductor"):
        train(tiny_task(), tiny_run(tmp_path, compute={"compile": True, "compile_backend": "inductr"}))


def test_packed_rows_train_as_one_sample_a_row(tmp_path: Path) -> None:
    """The same samples in a step, two a row or one a row: the mean is over loss positions, so nothing changes."""
    packed, _ = trained_weights(tmp_path / "packed")
    alone = [[sample] for row in ROWS for sample in row]
    task = tiny_task()
    task.source = ListSource(alone, LENGTH)
    unpacked = train(task, tiny_run(tmp_path / "unpacked", batch={"rows": 16}))
    assert largest_difference(packed, unpacked) < 1e-6


def test_padding_on_the_right_changes_nothing(tmp_path: Path) -> None:
    task = tiny_task()
    task.source = ListSource(ROWS, LENGTH + 13)
    wide = train(task, tiny_run(tmp_path / "wide", batch={"length": LENGTH + 13}))
    narrow, _ = trained_weights(tmp_path / "narrow")
    assert largest_difference(wide, narrow) < 1e-6


# the forecast


def sized(tmp_path: Path, **sections: Any) -> RunConfig:
    return tiny_run(tmp_path, batch={"rows": 4, "micro_rows": 2, "length": 128}, **sections)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_within_a_quarter_of_what_the_forward_pass_keeps(checkpointing: bool, tmp_path: Path) -> None:
    config = replace(CONFIG, hidden_size=128, inner_hidden_size=512, num_layers=4, vocab_size=96 + 8)
    model = GLM(config)
    initialize(model, 0)
    model.transformer.gradient_checkpointing = checkpointing
    batch = collate(pack([sample for row in ROWS[:8] for sample in row], 128)[:2], 128)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its memory would be given to the next one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model, batch, attend=attend_for(batch, config))
    run = sized(tmp_path, compute={"checkpointing": checkpointing})
    told = activation_bytes(run, config, "fp32")
    if checkpointing:  # the layer that is computed again is not alive in the forward pass
        told -= activation_bytes(run, replace(config, num_layers=1), "fp32") - 2 * 128 * 128 * 4 - 2 * 128**2
    assert told == pytest.approx(sum(kept.values()), rel=0.25)


def test_state_and_disk_bytes_are_those_of_the_tensors(tmp_path: Path) -> None:
    task = tiny_task()
    run = sized(tmp_path)
    tensors = tensors_of(task.model, make_optimizer(task.model, run.optimizer))
    stored = sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim)  # but AdamW's step counters
    gradients = sum(parameter.nbytes for parameter in task.model.parameters())
    told = forecast(run, CONFIG)
    assert told.states == stored + gradients and told.disk == stored
    assert told.parameters == told.trained == CONFIG.num_parameters


def test_full_training_of_6b_needs_what_the_specification_says(tmp_path: Path) -> None:
    """92.0 GiB of states; 0.44 GiB of layer inputs and 0.3 of one layer at 2,048 tokens."""
    from chatglm.config import ModelConfig

    run = tiny_run(
        tmp_path,
        batch={"micro_rows": 1, "length": 2048},
        compute={"precision": "bf16", "checkpointing": True},
        parallel={"strategy": "fsdp"},
    )
    told = forecast(run, ModelConfig(), processes=1)
    assert told.states / 2**30 == pytest.approx(92.0, abs=0.05)
    assert (told.activations / 2**30) == pytest.approx(0.44 + 0.3 + 0.38, abs=0.05)  # and one layer's narrow weights
    assert forecast(run, ModelConfig(), processes=8).states == told.states // 8
    assert any("states 91.9" in line or "states 92.0" in line for line in lines_of(told))


def test_flops_of_a_token_are_those_of_the_specification() -> None:
    from chatglm.config import ModelConfig

    assert flops_per_token(ModelConfig(), 2048) == pytest.approx(39.9e9, rel=0.005)
