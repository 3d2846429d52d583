"""Files ↔ tensors: original shards and safetensors, eras, verifying, saving, converting, the hub.

Read in this order: tensor_file, torch_zip, layout, folder, verifying, loading, saving, converting, hub. Names are
imported on first use, because listing and verifying a checkpoint needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import hub
    from .converting import convert, convert_ptuning
    from .folder import Checkpoint, open_checkpoint
    from .layout import TensorSpec, expected_tensors
    from .loading import load_into
    from .memory import cache_bytes, estimate_memory, weight_bytes
    from .problem import Problem
    from .random_weights import random_checkpoint
    from .saving import save
    from .tensor_file import Progress, TensorEntry
    from .verifying import check, verify

__all__ = [
    "Checkpoint",
    "Problem",
    "Progress",
    "TensorEntry",
    "TensorSpec",
    "cache_bytes",
    "check",
    "convert",
    "convert_ptuning",
    "estimate_memory",
    "expected_tensors",
    "hub",
    "load_into",
    "open_checkpoint",
    "random_checkpoint",
    "save",
    "verify",
    "weight_bytes",
]

_HOMES = {
    "Checkpoint": "folder",
    "Problem": "problem",
    "Progress": "tensor_file",
    "TensorEntry": "tensor_file",
    "TensorSpec": "layout",
    "cache_bytes": "memory",
    "check": "verifying",
    "convert": "converting",
    "convert_ptuning": "converting",
    "estimate_memory": "memory",
    "expected_tensors": "layout",
    "load_into": "loading",
    "open_checkpoint": "folder",
    "random_checkpoint": "random_weights",
    "save": "saving",
    "verify": "verifying",
    "weight_bytes": "memory",
}


def __getattr__(name: str) -> Any:
    if name == "hub":
        return importlib.import_module(".hub", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
