"""Kernels for CUDA devices, in Triton.

Read in this order: streams, packed, plain (the slow twins: what every kernel computes), launch; then the kernels
themselves: gemv, small_matmul, norm, decode_attention, step_ends, prefill_parts. `launch` and the kernels import
Triton; `operations` alone imports them, after `probe.choose_kernels` said so.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from .packed import FusedNorm, PackedWeight
from .streams import from_streams, to_streams

__all__ = ["FusedNorm", "PackedWeight", "from_streams", "operations", "to_streams"]


def operations(kind: str) -> ModuleType:
    """The module of operations for `triton` or `torch`: `launch` or `plain`, of the same signatures."""
    return importlib.import_module(".launch" if kind == "triton" else ".plain", __name__)
