"""Sequences in, tokens out: one runner for a single chat and for many users.

Read in this order: sampling, sequence, kv_cache, runner, sampler, scheduler; beam and loading stand beside them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .beam import beam_search
    from .kv_cache import KVCache
    from .loading import LoadedModel, load_model
    from .runner import Runner
    from .sampler import Sampler
    from .sampling import SamplingParams
    from .scheduler import Engine, Scheduler, StepOutput
    from .sequence import FinishReason, Sequence

_HOMES = {
    "Engine": "scheduler",
    "FinishReason": "sequence",
    "KVCache": "kv_cache",
    "LoadedModel": "loading",
    "Runner": "runner",
    "Sampler": "sampler",
    "SamplingParams": "sampling",
    "Scheduler": "scheduler",
    "Sequence": "sequence",
    "StepOutput": "scheduler",
    "beam_search": "beam",
    "load_model": "loading",
}

__all__ = [
    "Engine",
    "FinishReason",
    "KVCache",
    "LoadedModel",
    "Runner",
    "Sampler",
    "SamplingParams",
    "Scheduler",
    "Sequence",
    "StepOutput",
    "beam_search",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
