"""From a checkpoint folder to a model that is ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import check, estimate_memory, load_into, open_checkpoint
from ..config import ModelConfig
from ..model import GLM
from ..parallel import ProcessGroup, Transform, connect, shard_model, sharded
from ..quantization import convert_on_load, swap_as_described
from ..tokenizer import Tokenizer
from .placement import (
    DTYPES,
    SMALL_MODEL_BYTES,
    WEIGHT_FORMATS,
    Placement,
    check_room,
    choose_placement,
    normalize_dtype,
)

Progress = Callable[[int, int, str], None]
"""(bytes done, bytes in all, what) while something long runs."""


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, with its tokenizer. `weights` names the form of the linears: fp32, fp16, bf16, int8,
    int4.
    """

    model: GLM
    tokenizer: Tokenizer
    config: ModelConfig
    folder: Path
    placement: Placement
    weights: str


def load_model(
    folder: Path,
    dtype: str = "auto",
    device: str = "auto",
    *,
    group: ProcessGroup | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a checkpoint folder: verified first, then built without memory, then filled one tensor at a time.

    dtype   auto, fp32, fp16, bf16 (a quantised checkpoint is expanded), int8, int4 (weights only: as stored where the
            checkpoint has these bits, else quantised as tensors arrive, which never takes more than the result and
            one tensor)
    device  auto, cpu, cuda, cuda:N, mps
    group   this process's part in a model split over several devices
    Raises CheckpointError, ConfigError, TokenizerError or DeviceError before memory is spent.
    """
    check(folder)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    tokenizer = Tokenizer.from_folder(folder, config=config)
    dtype = normalize_dtype(dtype)
    wanted = wanted_form(config, dtype)
    bits = wanted.quantization_bit
    placement = place(config, dtype, device)

    form = f"int{bits}" if bits else _NAMES[placement.dtype]
    if group is None:
        check_room(placement.device, {name: estimate_memory(config, name) for name in (*DTYPES, *WEIGHT_FORMATS)}, form)

    with torch.device("meta"):
        model = GLM(config.quantized(0))
    if group:
        shard_model(model, group.rank, group.world_size)
    swap_as_described(model, wanted)
    transform: Transform | None = convert_on_load(config, wanted)
    if group:
        transform = sharded(config, group.rank, group.world_size, then=transform)
    load_into(model, checkpoint, dtype=placement.dtype, device=placement.device, transform=transform, progress=progress)
    if group:
        connect(model, group)
    model.requires_grad_(False)
    model.eval()
    return LoadedModel(model, tokenizer, model.config, folder, placement, form)


def place(config: ModelConfig, dtype: str, device: str) -> Placement:
    """Device and float dtype for a stored checkpoint. config: as stored; dtype: as normalize_dtype gives it."""
    bits = wanted_form(config, dtype).quantization_bit
    is_expanded = config.quantization_bit != 0 and bits == 0  # scale times code is no fp16 number
    return choose_placement(
        device,
        "auto" if dtype in WEIGHT_FORMATS else dtype,
        estimate_memory(config, f"int{bits}") if bits else config.num_parameters * 4,
        is_fp16_exact=bits != 0 or not (is_expanded or config.torch_dtype == "float32"),
    )


def wanted_form(config: ModelConfig, dtype: str) -> ModelConfig:
    """The description of the weights as they will be held. config: as stored; dtype: as normalize_dtype gives it.

    A checkpoint that has the asked bits keeps its own format, the original's too; any other becomes the project's own.
    """
    stored = config.quantization_bit
    if dtype == "auto":
        is_small = config.num_parameters * 4 < SMALL_MODEL_BYTES
        return config.quantized(0) if is_small else config
    bits = int(dtype[-1]) if dtype in WEIGHT_FORMATS else 0
    return config if bits and bits == stored else config.quantized(bits)
