"""P-tuning v2: only the prefix encoder learns, in fp32, over floats or quantised weights.

Source: P-Tuning v2 (ACL 2022) §3; the original's `ptuning/`: a new prefix has PyTorch's default initialisation.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ...checkpoint.adapter import PrefixAdapter, open_adapter
from ...checkpoint.layout import PREFIX
from ...checkpoint.reading import read_tensor
from ...config import ModelConfig
from ...engine.adapters import with_prefix
from ...errors import CheckpointError, TrainingError
from ...model import GLM
from ...model.prefix import PrefixEncoder
from .settings import PtuningSettings


def prefixed(config: ModelConfig, settings: PtuningSettings) -> ModelConfig:
    """The description of a base with the prefix of the settings. Raises TrainingError for a base with another one."""
    wanted = replace(config, pre_seq_len=settings.pre_seq_len, prefix_projection=settings.prefix_projection)
    has_other = (config.pre_seq_len, config.prefix_projection) != (wanted.pre_seq_len, wanted.prefix_projection)
    if config.pre_seq_len is not None and has_other:
        raise TrainingError(
            f"the base has a tuned prefix of {config.pre_seq_len} vectors (projection {config.prefix_projection}), "
            f"the run asks for {wanted.pre_seq_len} (projection {wanted.prefix_projection})",
            cure=f"method.pre_seq_len: {config.pre_seq_len}, or start from a base without a prefix",
        )
    return wanted


def add_prefix(model: GLM, config: ModelConfig, settings: PtuningSettings, seed: int) -> GLM:
    """Give the model its prefix encoder, in place: of `settings.start`, of its checkpoint, or a new one.

    config  with the prefix (`prefixed`)
    """
    held = getattr(model.transformer, "prefix_encoder", None)
    is_filled = held is not None and not any(parameter.is_meta for parameter in held.parameters())
    encoder = held if is_filled else _new(config, seed)
    assert isinstance(encoder, PrefixEncoder)
    if settings.start is not None:
        _fill(encoder, config, Path(settings.start))
    for owner in (model, model.transformer):
        owner.config = config
    model.transformer.description = config
    model.transformer.prefix_encoder = encoder.float()
    model.requires_grad_(False)
    encoder.requires_grad_(True)
    return model


def _new(config: ModelConfig, seed: int) -> PrefixEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PrefixEncoder(config)


def _fill(encoder: nn.Module, config: ModelConfig, folder: Path) -> None:
    try:
        adapter = open_adapter(folder)
        if not isinstance(adapter, PrefixAdapter):
            raise CheckpointError(f"{folder} holds a LoRA, no prefix", cure="method.name: lora")
        found = with_prefix(config, adapter)
    except CheckpointError as error:
        raise TrainingError(f"`method.start`: {error.message}", cure=error.cure) from error
    if (found.pre_seq_len, found.prefix_projection) != (config.pre_seq_len, config.prefix_projection):
        raise TrainingError(
            f"`method.start`: {folder} has {found.pre_seq_len} vectors (projection {found.prefix_projection}), the run "
            f"{config.pre_seq_len} (projection {config.prefix_projection})",
            cure=f"method.pre_seq_len: {found.pre_seq_len}",
        )
    tensors = {name.removeprefix(PREFIX): read_tensor(entry).float() for name, entry in adapter.tensors.items()}
    encoder.load_state_dict(tensors)
