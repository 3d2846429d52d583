"""Where a run starts: weights and tokenizer, from a checkpoint or drawn anew."""

from __future__ import annotations

import difflib
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..chat import EMBEDDED_MODEL
from ..checkpoint import hub, load_into, open_checkpoint
from ..config import ModelConfig
from ..errors import ConfigError, TrainingError
from ..model import GLM, initialize
from ..quantization import convert_on_load
from ..tokenizer import Tokenizer
from ..tokenizer.model_file import TOKENIZER_FILE
from .run_config import ModelSettings

EMBEDDED = "embedded"


def source_folder(source: str) -> Path:
    """The folder of `model.source`: the embedded model, a folder, or a hub name that was pulled."""
    if source == EMBEDDED:
        return EMBEDDED_MODEL
    return Path(source) if Path(source).is_dir() else hub.resolve(source)


def starting_config(settings: ModelSettings) -> ModelConfig:
    """The model's description, without its weights; of a quantised checkpoint the one with floats.

    Raises TrainingError for an unknown key of `model.config`, with the nearest one.
    """
    if settings.source is not None:
        if settings.config:
            raise TrainingError("give `model.source` or `model.config`, one of them")
        return open_checkpoint(source_folder(settings.source)).config.quantized(0)
    known = {field.name for field in fields(ModelConfig)}
    for key in settings.config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise TrainingError(
                f"unknown key `model.config.{key}`", cure=f"did you mean `{near[0]}`?" if near else None
            )
    values: dict[str, Any] = dict(settings.config)
    layers = values.get("num_layers", ModelConfig.num_layers)
    if settings.deepnorm and values.get("norm_order", "post_scaled") == "post_scaled":
        values.setdefault("residual_scale", math.sqrt(2 * layers))
    try:
        return ModelConfig(**values)
    except ConfigError as error:
        raise TrainingError(f"model.{error.message.removeprefix('config: ')}", cure=error.cure) from error


def starting_model(settings: ModelSettings, seed: int) -> GLM:
    """The weights in fp32 on the CPU: a checkpoint's (INT8 and INT4 expanded), or random ones (DeepNorm)."""
    config = starting_config(settings)
    if settings.source is None:
        with torch.device("meta"):
            model = GLM(config)
        model.to_empty(device="cpu")  # nothing is drawn twice
        model.tie_head()
        initialize(model, seed)
        return model
    with torch.device("meta"):
        model = GLM(config)
    checkpoint = open_checkpoint(source_folder(settings.source))
    transform = convert_on_load(checkpoint.config, config) if checkpoint.config.quantization_bit else None
    load_into(model, checkpoint, dtype=torch.float32, transform=transform)
    return model


def tokenizer_file(settings: ModelSettings) -> Path | None:
    """The tokenizer of a run: `model.tokenizer`, or the checkpoint's own; None where there is neither."""
    if settings.tokenizer is not None:
        path = EMBEDDED_MODEL if settings.tokenizer == EMBEDDED else Path(settings.tokenizer)
        path = path / TOKENIZER_FILE if path.is_dir() else path
        if not path.is_file():
            raise TrainingError(f"`model.tokenizer`: there is no {path}", cure=f"give the {TOKENIZER_FILE} of a model")
        return path
    return None if settings.source is None else open_checkpoint(source_folder(settings.source)).tokenizer_file


def starting_tokenizer(settings: ModelSettings, config: ModelConfig) -> Tokenizer:
    """The tokenizer, checked against the model's description."""
    path = tokenizer_file(settings)
    if path is None:
        raise TrainingError("a model with random weights brings no tokenizer", cure="model.tokenizer: embedded")
    tokenizer = Tokenizer.from_file(path, config=config)
    tokenizer.check_against(config)
    return tokenizer
