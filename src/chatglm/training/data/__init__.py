"""Training data: files of every known format → prepared sets of ids → streams of packed rows.

Read in this order: formats, inputs, blocks, layout, encoding, preparing, merging, prepared; packing, streams,
mixing, opening, remote.
Making a set needs no torch; reading it for training does.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Allowance": "problems",
    "Ingredient": "opening",
    "Layout": "layout",
    "MixedStream": "mixing",
    "PackedStream": "streams",
    "Preparation": "preparing",
    "PreparedSet": "prepared",
    "Reading": "encoding",
    "Stream": "streams",
    "TextStream": "streams",
    "hold_out": "mixing",
    "open_stream": "opening",
    "prepare": "preparing",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
