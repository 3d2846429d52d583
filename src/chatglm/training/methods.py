"""What of the model learns: all of it (`full`), or what an adapter method adds. One function a method, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from ..errors import TrainingError
from ..model import GLM
from .adapters.base import frozen_base, stored_config, wanted_config
from .adapters.lora import add_lora, lora_config
from .adapters.prefix import add_prefix, prefixed
from .adapters.saving import base_name, save_lora, save_prefix
from .adapters.settings import LoraSettings, PtuningSettings, settings_of
from .filling import Fill, empty_model, fill, is_shared_out
from .run_config import RunConfig
from .starting import starting_model


@dataclass(frozen=True)
class Tuned:
    """A model ready for the loop: what learns has `requires_grad`.

    exported  writes `OUT/model` where that is no plain checkpoint (adapters); None: the GLM's weights
    fill      of a model that is still empty: see task.Task
    """

    model: nn.Module
    exported: Callable[[Path], object] | None = None
    fill: Fill | None = None

    @property
    def glm(self) -> GLM:
        return next(module for module in self.model.modules() if isinstance(module, GLM))


def _full(run: RunConfig) -> Tuned:
    return Tuned(starting_model(run.model, run.seed))


def _lora(run: RunConfig) -> Tuned:
    settings = settings_of(run.method)
    assert isinstance(settings, LoraSettings)
    described = lora_config(settings)
    model = add_lora(frozen_base(run, wanted_config(run, settings)), settings, run.seed)
    return Tuned(model, partial(save_lora, model=model, peft_config=described, base=base_name(run.model)))


def _ptuning(run: RunConfig) -> Tuned:
    settings = settings_of(run.method)
    assert isinstance(settings, PtuningSettings)
    config = prefixed(wanted_config(run, settings), settings)
    model = add_prefix(frozen_base(run, config), config, settings, run.seed)
    described = prefixed(stored_config(run), settings)
    return Tuned(model, partial(save_prefix, model=model, described=described, base=base_name(run.model)))


METHODS: dict[str, Callable[[RunConfig], Tuned]] = {
    "full": _full,
    "lora": _lora,
    "qlora": _lora,
    "ptuning": _ptuning,
}
"""By the `name` of the `method` section; its other keys belong to the method."""


def tuned(run: RunConfig, *, may_be_empty: bool = False) -> Tuned:
    """The model of a run under its method. Raises TrainingError for an unknown one, with the nearest name.

    may_be_empty  on the meta device, with `fill`, where all weights learn and the processes will share them out
    """
    name = method_name(run)
    if may_be_empty and name == "full" and is_shared_out(run):
        return Tuned(empty_model(run.model), fill=partial(fill, settings=run.model, seed=run.seed))
    return METHODS[name](run)


def method_name(run: RunConfig) -> str:
    """The `name` of the `method` section. Raises TrainingError for an unknown one."""
    name = str(run.method.get("name", "full"))
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        raise TrainingError(
            f"`method.name` is {name!r}; known: {', '.join(METHODS)}", cure=f"did you mean {near[0]}?" if near else None
        )
    return name
