"""Makes transformers' Auto classes open ChatGLM-6B checkpoints with the classes of this package.

`trust_remote_code=True`, as the model card prints it, asks transformers to run the Python files of the checkpoint
instead; whether classes registered here come first depends on its version. So where it would fetch one of the
original's classes from such a file, it is given ours: no file of the checkpoint is read as code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from .classification import ChatGLMForSequenceClassification
from .configuration import ChatGLMConfig
from .modeling import ChatGLMForConditionalGeneration, ChatGLMModel
from .tokenization import ChatGLMTokenizer

OWN_CLASSES: dict[str, Any] = {
    own.__name__: own
    for own in (
        ChatGLMConfig,
        ChatGLMTokenizer,
        ChatGLMModel,
        ChatGLMForConditionalGeneration,
        ChatGLMForSequenceClassification,
    )
}

_AUTO_MODULES = ("configuration_auto", "auto_factory", "tokenization_auto")
_FETCH = "get_class_from_dynamic_module"


def register() -> None:
    """Register the classes. Doing it again changes nothing."""
    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
    for auto in (AutoModel, AutoModelForSeq2SeqLM, AutoModelForCausalLM):
        auto.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoModelForSequenceClassification.register(ChatGLMConfig, ChatGLMForSequenceClassification, exist_ok=True)
    for name in _AUTO_MODULES:
        module = importlib.import_module(f"transformers.models.auto.{name}")
        fetch = getattr(module, _FETCH)
        if not getattr(fetch, "knows_chatglm", False):
            setattr(module, _FETCH, _own_classes_first(fetch))


def _own_classes_first(fetch: Callable[..., Any]) -> Callable[..., Any]:
    def fetch_class(class_reference: str, *args: Any, **kwargs: Any) -> Any:
        own = OWN_CLASSES.get(class_reference.rsplit(".", 1)[-1])
        return fetch(class_reference, *args, **kwargs) if own is None else own

    fetch_class.knows_chatglm = True  # type: ignore[attr-defined]
    return fetch_class
