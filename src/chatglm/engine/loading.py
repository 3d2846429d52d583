"""From a checkpoint folder to a model that is ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..checkpoint import check, estimate_memory, load_into, open_checkpoint
from ..config import ModelConfig
from ..model import GLM
from ..parallel import ProcessGroup, Transform, connect, shard_model, sharded
from ..quantization import dequantize_model, quantize_on_load, swap_linears
from ..tokenizer import Tokenizer
from .placement import DTYPES, WEIGHT_FORMATS, Placement, check_room, choose_placement, normalize_dtype

Progress = Callable[[int, int, str], None]
"""(bytes done, bytes in all, what) while something long runs."""

SMALL_MODEL_BYTES = 1 << 30
"""A quantised checkpoint smaller than this when expanded to fp32 is expanded: faster, and the memory does not
matter."""


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

    dtype   auto, fp32, fp16, bf16 (a quantised checkpoint is expanded), int8, int4 (weights only)
    device  auto, cpu, cuda, cuda:N, mps
    group   this process's part in a model split over several devices
    Raises CheckpointError, ConfigError, TokenizerError or DeviceError before memory is spent.
    """
    check(folder)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    tokenizer = Tokenizer.from_folder(folder, config=config)
    dtype = normalize_dtype(dtype)
    fp32_bytes = config.num_parameters * 4
    stored = config.quantization_bit
    wanted = int(dtype[-1]) if dtype in WEIGHT_FORMATS else 0
    expand = stored > 0 and (fp32_bytes < SMALL_MODEL_BYTES if dtype == "auto" else wanted != stored)
    bits = 0 if expand else stored or wanted
    activations = "auto" if dtype in WEIGHT_FORMATS else dtype
    placement = choose_placement(device, activations, estimate_memory(config, f"int{bits}") if bits else fp32_bytes)

    form = f"int{bits}" if bits else _NAMES[placement.dtype]
    if group is None:
        check_room(placement.device, {name: estimate_memory(config, name) for name in (*DTYPES, *WEIGHT_FORMATS)}, form)

    plain = replace(config, quantization_bit=0, quantization_embeddings=False)
    with torch.device("meta"):
        model = GLM(plain)
    transform: Transform | None = None
    if group:
        shard_model(model, group.rank, group.world_size)
    if stored:
        swap_linears(model, stored, embeddings=config.quantization_embeddings)
    elif wanted:
        swap_linears(model, wanted, embeddings=True)
        transform = quantize_on_load(wanted, embeddings=True)
    if group:
        transform = sharded(config, group.rank, group.world_size, then=transform)
    load_into(model, checkpoint, dtype=placement.dtype, device=placement.device, transform=transform, progress=progress)
    if expand:
        dequantize_model(model, placement.dtype)
        if wanted:
            swap_linears(model, wanted, embeddings=True)
    if group:
        connect(model, group)
    model.requires_grad_(False)
    model.eval()
    held = model.config.quantization_bit
    weights = f"int{held}" if held else _NAMES[placement.dtype]
    return LoadedModel(model, tokenizer, model.config, folder, placement, weights)
