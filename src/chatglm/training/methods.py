"""What of the model learns: all of it (`full`), or what an adapter method adds. One function a method, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..errors import TrainingError
from ..model import GLM
from .run_config import RunConfig
from .starting import starting_model


@dataclass(frozen=True)
class Tuned:
    """A model ready for the loop: what learns has `requires_grad`.

    exported  writes `OUT/model` where that is no plain checkpoint (adapters); None: the GLM's weights
    """

    model: nn.Module
    exported: Callable[[Path], None] | None = None

    @property
    def glm(self) -> GLM:
        return next(module for module in self.model.modules() if isinstance(module, GLM))


def _full(run: RunConfig) -> Tuned:
    return Tuned(starting_model(run.model, run.seed))


METHODS: dict[str, Callable[[RunConfig], Tuned]] = {"full": _full}
"""By the `name` of the `method` section; its other keys belong to the method."""


def tuned(run: RunConfig) -> Tuned:
    """The model of a run under its method. Raises TrainingError for an unknown one, with the nearest name."""
    name = str(run.method.get("name", "full"))
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        raise TrainingError(
            f"`method.name` is {name!r}; known: {', '.join(METHODS)}", cure=f"did you mean {near[0]}?" if near else None
        )
    return METHODS[name](run)
