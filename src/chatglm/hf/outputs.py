"""What the classes return, in the original's shapes, and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.utils import ModelOutput

IGNORED_LABEL = -100


@dataclass
class ChatGLMModelOutput(ModelOutput):
    """last_hidden_state [tokens, batch, hidden], also `hidden_states`; attentions [batch * heads, query, key]."""

    last_hidden_state: Tensor | None = None
    cache: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def past_key_values(self) -> Any:
        return self.cache


@dataclass
class ChatGLMOutput(ModelOutput):
    """loss (scalar), logits [batch, tokens, vocab]; the rest as in ChatGLMModelOutput."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def past_key_values(self) -> Any:
        return self.cache


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in fp32 of logits[:, i] against labels[:, i + 1]; -100 is left out."""
    scores = logits[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(scores, labels[:, 1:].flatten().to(scores.device), ignore_index=IGNORED_LABEL)
