"""Small checkpoint folders to read, break and convert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from chatglm.config import ModelConfig, to_original
from chatglm.tokenizer.protobuf import bytes_field, scan
from golden_vectors import GOLDEN

MODELS = GOLDEN / "models"
NAMES = sorted(path.name for path in MODELS.iterdir())
PREFIX_ONLY = [name for name in NAMES if name.endswith("prefix-only")]
WHOLE = [name for name in NAMES if name not in PREFIX_ONLY]

SMALL = ModelConfig(
    vocab_size=552,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    inner_hidden_size=32,
    bos_token_id=204,
    eos_token_id=205,
    mask_token_id=200,
    gmask_token_id=201,
)
"""Fits the reduced tokenizer of the golden data."""


def golden_copy(name: str, to: Path, *, tokenizer: bool = True) -> Path:
    """A copy of `models/<name>` that may be broken, with the tokenizer that fits it."""
    folder = to / name
    shutil.copytree(MODELS / name, folder)
    if tokenizer and "full-vocab" not in name:
        for file in (GOLDEN / "tokenizer-reduced").iterdir():
            shutil.copy(file, folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}), encoding="utf-8")


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a `.bin` file after `edit` changed its tensors in place."""
    tensors = torch.load(path, weights_only=True)
    edit(tensors)
    torch.save(tensors, path)


def small_safetensors(folder: Path, config: ModelConfig = SMALL, dtype: torch.dtype = torch.float16) -> Path:
    """A folder with one safetensors file of random weights, written without the checkpoint room."""
    from chatglm.model import GLM

    folder.mkdir()
    torch.manual_seed(0)
    state = {name: tensor.to(dtype) for name, tensor in GLM(replace(config, tied_head=False)).state_dict().items()}
    if config.tied_head:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_original(config)), encoding="utf-8")
    for file in (GOLDEN / "tokenizer-reduced").iterdir():
        shutil.copy(file, folder)
    return folder


@cache
def first_release(slim: bytes, appended: int = 344) -> bytes:
    """The first-release form of a tokenizer file: without its last pieces and `byte_fallback` (field 35 of field 2)."""
    out: list[bytes] = []
    fields = scan(slim, 0, len(slim))
    dropped = {entry.start for entry in [entry for entry in fields if entry.number == 1][-appended:]}
    for entry in fields:
        if entry.number == 2:
            parts = [part for part in scan(slim, entry.value, entry.end) if part.number != 35]
            out.append(bytes_field(2, b"".join(slim[part.start : part.end] for part in parts)))
        elif entry.start not in dropped:
            out.append(slim[entry.start : entry.end])
    return b"".join(out)
