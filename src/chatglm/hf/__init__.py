"""ChatGLM-6B under transformers' names.

After `import chatglm.hf` the lines of the model card work as printed, `trust_remote_code=True` included, and no Python
file of the checkpoint runs. Read in this order: configuration, tokenization, inputs, pretrained, modeling, generation,
conversation.
"""

from __future__ import annotations

from ..errors import MissingExtraError

try:
    import transformers as _transformers  # noqa: F401
except ImportError as _error:
    raise MissingExtraError("transformers", extra="hf", purpose="chatglm.hf") from _error

from .cache import ChatGLMCache
from .classification import ChatGLMForSequenceClassification
from .configuration import ChatGLMConfig
from .modeling import ChatGLMForConditionalGeneration, ChatGLMModel
from .pretrained import ChatGLMPreTrainedModel
from .registration import register
from .tokenization import ChatGLMTokenizer

__all__ = [
    "ChatGLMCache",
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMModel",
    "ChatGLMPreTrainedModel",
    "ChatGLMTokenizer",
    "register",
]

register()
