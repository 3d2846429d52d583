"""The roles beside a policy: a copy with the same weights, in the dtype and on the device that the loop uses."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ...engine.placement import choose_device
from ...model import GLM
from ..preparing import InputEmbedding
from ..run_config import RunConfig
from ..sharding import glms


def copy_of(model: GLM) -> GLM:
    """A language model with the same weights in memory of its own."""
    with torch.device("meta"):
        made = GLM(model.config)
    made.to_empty(device=model.device)
    made.tie_head()
    for mine, theirs in zip(made.parameters(), model.parameters(), strict=True):
        mine.data = theirs.detach().clone()  # keeps the dtype too
    made.tie_head()
    return made.train(model.training)


def without_dropout(model: GLM) -> GLM:
    """The same model, in place, with nothing dropped in training: ratios compare it with what drew the answers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def in_dtype(model: nn.Module, dtype: torch.dtype) -> list[Any]:
    """Let activations of a frozen model run in the dtype that the loop trains in: its log-probabilities are compared.

    returns  handles, whose `remove()` ends it
    """
    hook = InputEmbedding(dtype)
    return [glm.transformer.word_embeddings.register_forward_hook(hook) for glm in glms(model)]


def own_device(config: RunConfig) -> torch.device:
    """The device of this process, as the loop will choose it."""
    chosen = torch.device(choose_device(config.compute.device))
    is_any = chosen.type == "cuda" and chosen.index is None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if is_any else chosen
