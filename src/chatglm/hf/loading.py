"""What `from_pretrained` does beside transformers' own loading: verify first, and speak of a prefix that is new."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from ..checkpoint import open_checkpoint, verify
from ..checkpoint.loading import untied
from ..checkpoint.problem import FileError, raise_for
from ..checkpoint.reading import holds_same
from ..errors import CheckpointError

logger = logging.get_logger("transformers.chatglm")

_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

DTYPE_KEY = "dtype" if _VERSION >= (4, 56) else "torch_dtype"
"""The argument of `from_pretrained`; the older name is a warning where the newer one exists."""

TIED_WEIGHTS: Any = (
    {"lm_head.weight": "transformer.word_embeddings.weight"} if _VERSION >= (5, 0) else ["lm_head.weight"]
)

_NOT_A_FOLDER_OF_OURS = ("gguf_file", "state_dict", "subfolder", "variant", "quantization_config")
"""Arguments that make transformers read something else than the files at the top of the folder."""


def verify_before_loading(
    source: str | os.PathLike[str] | None, kwargs: Mapping[str, Any], own: tuple[str, ...] = ()
) -> None:
    """Raise CheckpointError for a local folder that cannot be loaded, before memory is spent.

    A folder without config.json is left to transformers (adapters), a hub name too.
    own  beginnings of tensor names that the class has beside the language model's
    """
    if source is None or any(kwargs.get(key) for key in _NOT_A_FOLDER_OF_OURS):
        return
    folder = Path(source)
    if not (folder / "config.json").is_file():
        return
    raise_for([p for p in verify(folder, tokenizer=False) if not p.tensor.startswith(own)], str(folder))
    checkpoint = open_checkpoint(folder)
    if checkpoint.is_prefix_only:
        raise CheckpointError(
            f"{folder} holds a P-tuning prefix alone, without the model it was trained on",
            cure="load the base with this folder's pre_seq_len, then the prefix into model.transformer.prefix_encoder "
            "(docs/transformers.md), or merge both with `chatglm convert --ptuning`",
        )
    if checkpoint.config.tied_head:
        for name, entry in checkpoint.tensors.items():
            table = checkpoint.tensors.get(name.replace("lm_head.", "transformer.word_embeddings."))
            if name.startswith("lm_head.") and (table is None or not holds_same(entry, table)):
                raise FileError(untied(entry))


def fill_new_prefix(model: Any) -> None:
    """Start a prefix that transformers (before 4.51) left without memory because the checkpoint has none."""
    encoder = getattr(getattr(model, "transformer", model), "prefix_encoder", None)
    for part in encoder.modules() if encoder is not None else ():
        if any(parameter.is_meta for parameter in part.parameters(recurse=False)):
            part.to_empty(device=model.device, recurse=False)
            part.to(torch.float32)
            part.reset_parameters()
            model.has_new_prefix = True


def report_new_prefix(model: Any) -> None:
    """One warning when `pre_seq_len` was asked for and the checkpoint has no prefix: the answers will be noise."""
    if model.config.pre_seq_len is None:
        return
    parts = [model, getattr(model, "transformer", None)]
    if any(getattr(part, "has_new_prefix", False) for part in parts):
        logger.warning(
            f"a new P-tuning prefix of {model.config.pre_seq_len} tokens was started (the checkpoint holds none): "
            "train it, or load a trained one into model.transformer.prefix_encoder, before asking the model anything"
        )
