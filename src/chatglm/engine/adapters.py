"""Several adapters beside one base: for each a twin of the model that shares every weight with it.

A LoRA's twin has its low-rank product beside the base's linears, whatever form those have; a P-tuning prefix's twin has
a prefix encoder of its own. Twins run in plain PyTorch over the base's KV cache; the base keeps its fast kernels. A
twin costs the memory of its adapter.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checkpoint.adapter import Adapter, LoraAdapter, LowRank, PrefixAdapter, open_adapter
from ..checkpoint.folder import Checkpoint
from ..checkpoint.layout import PREFIX
from ..checkpoint.reading import read_tensor
from ..config import ModelConfig
from ..errors import RequestError
from ..model import GLM
from ..model.prefix import PrefixEncoder

BASE = "base"
"""The name that asks for the model without an adapter."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class LowRankLinear(nn.Module):
    """base(x) + scaling · up · down · x, in the dtype of x. down: [rank, in], up: [out, rank]."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.scaling = scaling

    down: Tensor
    up: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        output: Tensor = self.base(hidden)
        low = functional.linear(hidden, self.down.to(hidden.dtype))  # [..., rank]
        return output + functional.linear(low, self.up.to(hidden.dtype)) * self.scaling


def check_name(name: str) -> None:
    """Raises RequestError for a name that no request could carry, or that means the base."""
    if name == BASE or NAME.fullmatch(name) is None:
        raise RequestError(
            f"{name!r} is no name for an adapter",
            cure=f"letters, digits, dots, dashes and underscores, at most 64, and not {BASE!r}",
        )


def open_adapters(folders: Mapping[str, str | Path], config: ModelConfig) -> dict[str, Adapter]:
    """Adapters by name, their sizes checked against the base. Raises CheckpointError or RequestError."""
    found: dict[str, Adapter] = {}
    for name, folder in folders.items():
        check_name(name)
        adapter = open_adapter(folder)
        if isinstance(adapter, LoraAdapter):
            adapter.check_fits(config)
        else:
            with_prefix(config, adapter)
        found[name] = adapter
    return found


def with_adapter(model: GLM, adapter: Adapter) -> GLM:
    """The model with an adapter, sharing its weights. Raises CheckpointError where they do not fit."""
    if isinstance(adapter, LoraAdapter):
        return _with_low_rank(model, adapter)
    return _with_prefix(model, adapter)


def with_prefix(config: ModelConfig, adapter: PrefixAdapter) -> ModelConfig:
    """The description of a base with this prefix. Raises CheckpointError where it was made for other sizes."""
    base = Checkpoint(adapter.folder, config, {}, None)  # sizes alone
    return base.with_prefix(adapter.folder).config


def _with_low_rank(model: GLM, adapter: LoraAdapter) -> GLM:
    adapter.check_fits(model.config)
    twin = _twin(model)
    for name, part in adapter.parts.items():
        twin.set_submodule(name, _low_rank(twin.get_submodule(name), part, model))
    return twin.eval()


def _low_rank(base: nn.Module, part: LowRank, model: GLM) -> LowRankLinear:
    down, up = (read_tensor(entry).to(device=model.device, dtype=model.dtype) for entry in (part.down, part.up))
    return LowRankLinear(base, down, up, part.scaling)


def _with_prefix(model: GLM, adapter: PrefixAdapter) -> GLM:
    config = with_prefix(model.config, adapter)
    twin = _twin(model)
    with torch.device("meta"):
        encoder = PrefixEncoder(config)
    tensors = {name.removeprefix(PREFIX): read_tensor(entry).float() for name, entry in adapter.tensors.items()}
    encoder.load_state_dict(tensors, assign=True)
    twin.config = twin.transformer.config = twin.transformer.description = config
    twin.transformer.prefix_encoder = encoder.to(model.device).requires_grad_(False)
    return twin.eval()


def _twin(model: GLM) -> GLM:
    """The same tensors in modules of their own, so that parts may be put in other places."""
    made = _copied(model)
    assert isinstance(made, GLM)
    return made


def _copied(module: nn.Module) -> nn.Module:
    made = copy.copy(module)
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    made._modules = {name: None if part is None else _copied(part) for name, part in module._modules.items()}
    return made
