"""A network that trains in milliseconds, rows for it, and runs of it: for the tests of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatglm.config import ModelConfig
from chatglm.model import GLM, initialize
from chatglm.training.loop import Report, train
from chatglm.training.loss import batch_loss
from chatglm.training.run_config import RunConfig
from chatglm.training.samples import IGNORE, Sample
from chatglm.training.settings import build
from chatglm.training.task import ListSource, Task

LENGTH = 40
CONFIG = ModelConfig(
    vocab_size=100,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    inner_hidden_size=64,
    max_sequence_length=64,
    bos_token_id=94,
    eos_token_id=95,
    mask_token_id=90,
    gmask_token_id=91,
    residual_scale=2.0,
)


def copying(seed: int) -> Sample:
    """A few random ids, `[gMASK]`, and the same ids again: 4 to 8 tokens each."""
    draw = np.random.default_rng(seed)
    tokens = int(draw.integers(4, 9))
    text = draw.integers(5, 20, tokens)
    places = np.concatenate([np.arange(tokens + 1), np.full(tokens, tokens)])
    blocks = np.concatenate([np.zeros(tokens + 1), np.arange(1, tokens + 1)])
    return Sample(
        ids=np.array([*text, CONFIG.gmask_token_id, CONFIG.bos_token_id, *text[:-1]], dtype=np.int32),
        targets=np.array([IGNORE] * (tokens + 1) + [*text], dtype=np.int32),
        positions=np.stack([places, blocks]).astype(np.int32),
        context_length=tokens + 1,
        objective="document",
    )


ROWS = [[copying(2 * row), copying(2 * row + 1)] for row in range(64)]
HELD_OUT = [[copying(1000 + row)] for row in range(8)]


def tiny_task(seed: int = 0) -> Task:
    """A fresh model and its rows."""
    model = GLM(CONFIG)
    initialize(model, seed)
    return Task(model, batch_loss, ListSource(ROWS, LENGTH), held_out=ListSource(HELD_OUT, LENGTH))


def tiny_run(out: Path, **sections: Any) -> RunConfig:
    """20 steps of 8 rows; sections are merged into the defaults."""
    values: dict[str, Any] = {
        "out": out,
        "steps": 20,
        "batch": {"rows": 8, "micro_rows": 4, "length": LENGTH},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup": 5},
        "save": {"every": 10},
        "log": {"every": 1, "tensorboard": False},
        "evaluate": {"rows": 8},
        "export": {"enabled": False},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, Mapping) else section
    return build(RunConfig, values, "test")


def weights(task: Task) -> dict[str, torch.Tensor]:
    """A copy of what was trained."""
    return {name: tensor.detach().clone() for name, tensor in task.model.state_dict().items()}


def trained_weights(out: Path, **sections: Any) -> tuple[Report, dict[str, torch.Tensor]]:
    """The report and the weights of a run."""
    task = tiny_task()
    report = train(task, tiny_run(out, **sections))
    return report, weights(task)


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
