"""The frozen base of an adapter run: floats in the run's precision, or INT8 and INT4 as they will be used."""

from __future__ import annotations

import torch

from ...checkpoint import load_into, open_checkpoint
from ...checkpoint.layout import PREFIX
from ...config import ModelConfig
from ...engine.placement import choose_device
from ...errors import TrainingError
from ...model import GLM
from ...quantization import convert_on_load, swap_as_described
from ..preparing import DTYPES, precision_of
from ..run_config import ComputeSettings, RunConfig
from ..starting import source_folder, starting_config, starting_model
from .settings import LoraSettings, PtuningSettings, QloraSettings


def base_dtype(compute: ComputeSettings) -> torch.dtype:
    """What frozen floats are held in: the precision of the run."""
    return DTYPES[precision_of(compute, torch.device(choose_device(compute.device)))]


def stored_config(run: RunConfig) -> ModelConfig:
    """The base as its checkpoint describes it."""
    if run.model.source is None:
        return starting_config(run.model)
    return open_checkpoint(source_folder(run.model.source)).config


def wanted_config(run: RunConfig, settings: LoraSettings | PtuningSettings) -> ModelConfig:
    """The base as it will lie in memory: plain LoRA's in floats, else as stored where that is quantised, or in the
    project's own format where the method asks for few bits.
    """
    config = starting_config(run.model)
    if not isinstance(settings, QloraSettings | PtuningSettings):
        return config
    stored = stored_config(run)
    if stored.quantization_bit:
        return stored
    if not settings.bits:
        return config
    # Embedding and head stay floats: few bits there cost quality, and the head is expanded for every chunk.
    return config.quantized(settings.bits, settings.group_size, embedding_bits=0)


def frozen_base(run: RunConfig, wanted: ModelConfig) -> GLM:
    """The weights of a run's base on the CPU, nothing of it learning, one stored tensor at a time.

    wanted  its description: weight format, and a prefix if there shall be one (unfilled, on the meta device, where
            the checkpoint has none)
    """
    if run.parallel.tensor > 1:
        raise TrainingError(
            "adapters are not trained with `parallel.tensor`", cure="parallel.tensor: 1 with parallel.strategy: fsdp"
        )
    dtype = base_dtype(run.compute)
    if run.model.source is None:
        model = starting_model(run.model, run.seed).to(dtype)
        return swap_as_described(model, wanted).requires_grad_(False)
    checkpoint = open_checkpoint(source_folder(run.model.source))
    with torch.device("meta"):
        model = GLM(wanted.quantized(0))
    swap_as_described(model, wanted)
    transform = convert_on_load(checkpoint.config, wanted)
    load_into(model, checkpoint, dtype=dtype, transform=transform, may_miss=(PREFIX,))
    return model.requires_grad_(False)
