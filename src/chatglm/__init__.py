"""ChatGLM-6B: run, compress, serve and train it on today's libraries.

Public names are imported on first use, so `import chatglm` costs no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import ChatModel, Delta, Reply, Usage, load
    from .config import ModelConfig
    from .engine import SamplingParams
    from .errors import ChatGLMError
    from .tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = ["ChatGLMError", "ChatModel", "Delta", "ModelConfig", "Reply", "SamplingParams", "Tokenizer", "Usage", "load"]

_HOMES = {
    "ChatGLMError": "errors",
    "ChatModel": "chat",
    "Delta": "chat",
    "ModelConfig": "config",
    "Reply": "chat",
    "SamplingParams": "engine",
    "Tokenizer": "tokenizer",
    "Usage": "chat",
    "load": "chat",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        # Where torch is not loaded yet: threads of its that wait by spinning take the core from those with work to do.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
