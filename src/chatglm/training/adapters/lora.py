"""LoRA and QLoRA: PEFT's low-rank products put into the native GLM, over floats or quantised weights alike.

The base's forward is its own: a quantised linear expands its weight for a product and again for the gradient of its
input (quantization.modules), and keeps no wide copy. Source: LoRA (Hu et al. 2021); QLoRA (Dettmers et al. 2023) §3.
"""

from __future__ import annotations

import importlib.util
import math
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoint.adapter import LoraAdapter, open_adapter
from ...checkpoint.reading import read_tensor
from ...errors import CheckpointError, MissingExtraError, TrainingError
from ...model import GLM
from ...quantization import QuantizedLinear
from .settings import LoraSettings

ADAPTER = "default"
"""PEFT's name for the one adapter that is trained."""

_HALF = re.compile(rf"(.+)\.lora_([AB])\.{ADAPTER}\.weight")


def lora_config(settings: LoraSettings) -> Any:
    """PEFT's description of the adapter. Raises MissingExtraError without PEFT."""
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", extra="train", purpose="LoRA")
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({QuantizedLinear: _over_quantised()})
    return config


@cache
def _over_quantised() -> type[nn.Module]:
    """PEFT's own layer, which asks of its base nothing but a forward."""
    from peft.tuners.lora import Linear

    class OverQuantized(Linear):
        """A low-rank product beside a quantised linear; merging goes through `chatglm convert --adapter`."""

        def merge(self, *args: Any, **kwargs: Any) -> None:
            raise TrainingError("a LoRA is not merged into packed weights", cure="chatglm convert --adapter DIR")

    return OverQuantized


def add_lora(model: GLM, settings: LoraSettings, seed: int) -> GLM:
    """Put fresh low-rank products beside the targets, in place, or those of `settings.start`; only they learn."""
    from peft.mapping import inject_adapter_in_model

    config = lora_config(settings)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Unsupported layer type", category=UserWarning)
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_HALF.fullmatch(name) is not None)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.transformer.has_dropout = settings.dropout > 0
    if settings.start is not None:
        _fill(model, settings)
    return model


def parts_of(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(linear, "A" or "B", parameter) of every low-rank product in a model."""
    for name, parameter in model.named_parameters():
        match = _HALF.fullmatch(name)
        if match is not None:
            yield match[1], match[2], parameter


def _fill(model: GLM, settings: LoraSettings) -> None:
    assert settings.start is not None
    folder = Path(settings.start)
    try:
        adapter = open_adapter(folder)
    except CheckpointError as error:
        raise TrainingError(f"`method.start`: {error.message}", cure=error.cure) from error
    if not isinstance(adapter, LoraAdapter):
        raise TrainingError(f"`method.start`: {folder} holds a P-tuning prefix, no LoRA", cure="method.name: ptuning")
    expected = {linear for linear, _, _ in parts_of(model)}
    if expected != set(adapter.parts):
        ends = sorted({name.rsplit(".", 1)[-1] for name in adapter.parts})
        raise TrainingError(
            f"`method.start`: {folder} has products beside {len(adapter.parts)} linears, this run beside "
            f"{len(expected)}",
            cure=f"method.targets: [{', '.join(ends)}]",
        )
    wanted = settings.alpha / settings.r
    for linear, half, parameter in parts_of(model):
        part = adapter.parts[linear]
        if part.rank != settings.r or not math.isclose(part.scaling, wanted):
            raise TrainingError(
                f"`method.start`: {folder} has rank {part.rank} and scaling {part.scaling:g}, this run r {settings.r} "
                f"and alpha / r {wanted:g}",
                cure=f"method.r: {part.rank} and method.alpha: {part.scaling * part.rank:g}",
            )
        value = read_tensor(part.down if half == "A" else part.up)
        if value.shape != parameter.shape:
            raise TrainingError(f"`method.start`: {linear} is {list(value.shape)}, here {list(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(value)
