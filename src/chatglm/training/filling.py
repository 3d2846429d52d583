"""A model whose processes hold parts of it, filled one tensor at a time: no process ever holds the whole.

It is built on the meta device, shared out while it is empty (sharding.py), given memory for its parts, and then each
process reads every tensor in turn and keeps its own part. Peak memory: the parts, and one tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoint import load_into, open_checkpoint
from ..checkpoint.loading import Transform
from ..model import GLM
from ..model.initialization import initial_values
from ..quantization import convert_on_load
from .run_config import ModelSettings, RunConfig
from .starting import source_folder, starting_config

Fill = Callable[[nn.Module], None]
"""Gives values to a model that was empty, whole or shared out."""


def is_shared_out(run: RunConfig) -> bool:
    """Whether the processes of a run will hold parts of a model of which all weights learn."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return processes > 1 and (run.parallel.strategy != "ddp" or run.parallel.tensor > 1)


def empty_model(settings: ModelSettings) -> GLM:
    """The model of a run on the meta device."""
    with torch.device("meta"):
        return GLM(starting_config(settings))


def give_memory(module: nn.Module, glms: Iterable[GLM], device: torch.device) -> None:
    """Memory without values for the parts that this process holds of an empty model."""
    module.to_empty(device=device)
    for glm in glms:
        glm.tie_head()


def fill(model: nn.Module, settings: ModelSettings, seed: int) -> None:
    """The values that `starting.starting_model` gives, each process its own part.

    model  the GLM, its parameters plain or sharded, in fp32
    Raises CheckpointError as `checkpoint.load_into` does.
    """
    assert isinstance(model, GLM)
    places = dict(model.named_parameters())
    if settings.source is None:
        for name, value in initial_values(empty_model(settings), seed):
            keep_own_part(places[name], value)
        return
    checkpoint = open_checkpoint(source_folder(settings.source))
    stand_in = empty_model(settings)
    expand = convert_on_load(checkpoint.config, stand_in.config) if checkpoint.config.quantization_bit else None
    load_into(stand_in, checkpoint, dtype=torch.float32, transform=_kept(places, expand))


def _kept(places: dict[str, nn.Parameter], expand: Transform | None) -> Transform:
    """Keeps the own part of every tensor that is read, and gives the loader one of the same shape without memory: its
    checks are wanted, not what it would hold.
    """

    def keep(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        for made, value in expand(name, tensor) if expand is not None else ((name, tensor),):
            if made in places and places[made].shape == value.shape:  # else the loader says what is wrong
                keep_own_part(places[made], value)
            yield made, torch.zeros((), dtype=torch.float32).expand(value.shape)

    return keep


@torch.no_grad()
def keep_own_part(place: Tensor, value: Tensor) -> None:
    """Copy into a tensor the part of `value` that this process holds of it: all of a plain one."""
    if not isinstance(place, DTensor):
        place.copy_(value)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(place.shape, place.device_mesh, place.placements)
    for axis, (size, start) in enumerate(zip(shape, offset, strict=True)):
        value = value.narrow(axis, min(start, value.shape[axis]), size)
    place.to_local().copy_(value)
