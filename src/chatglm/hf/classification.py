"""ChatGLMForSequenceClassification: a score for a whole sequence, as reward models are under transformers.

The original has no such class, so every library for preferences refused the model. Tensors are `transformer.*` and
`score.*`: what `chatglm train reward` writes. The score is read at the last real token, which is `<eop>` in an answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..errors import ConfigError
from .configuration import ChatGLMConfig
from .inputs import left_padding
from .modeling import ChatGLMModel
from .pretrained import ChatGLMPreTrainedModel


class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel):
    """Backbone and a linear head of `config.num_labels` rows; 1 row makes a reward model."""

    own_tensors = ("score.",)
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True) -> None:
        super().__init__(config)
        if config.quantization_bit:
            raise ConfigError(
                f"config: `quantization_bit` is {config.quantization_bit}; a classifier has float weights",
                cure="give the checkpoint that was quantised",
            )
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        table: nn.Module = self.transformer.word_embeddings
        return table

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Scores of whole sequences.

        input_ids       int64 [batch, tokens], context, `<sop>`, answer, `<eop>`; padding on either side
        attention_mask  [batch, tokens], 1 = real token, or the original's bool [batch, 1, query, key]
        labels          fp [batch] (num_labels 1: squared error) or int64 [batch] (classes: cross entropy)
        returns         logits fp32 [batch, num_labels]
        """
        kwargs.pop("use_cache", None)
        output = self.transformer(
            input_ids, position_ids, attention_mask, use_cache=False, return_dict=True, **_known(kwargs)
        )
        hidden = output.last_hidden_state.transpose(0, 1)  # [batch, tokens, hidden]
        rows = torch.arange(len(input_ids), device=hidden.device)
        last = hidden[rows, self._last_tokens(input_ids, attention_mask).to(hidden.device)]
        logits = self.score(last.to(self.score.weight.dtype)).float()
        loss = None
        if labels is not None and self.num_labels == 1:
            loss = nn.functional.mse_loss(logits[:, 0], labels.to(logits))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels.to(logits.device))
        result = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return result if return_dict or return_dict is None else result.to_tuple()

    def _last_tokens(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Index of every row's last real token, int64 [batch]."""
        if mask is not None and mask.dim() == 2:
            is_real = mask != 0
        else:
            is_real = ids != self.config.pad_token_id
            if mask is not None:  # the original's mask is for padding on the left
                is_real = is_real | (torch.arange(ids.shape[1], device=ids.device) >= left_padding(mask)[:, None])
        index = torch.arange(ids.shape[1], device=ids.device)
        return (is_real * index).argmax(dim=1)


def _known(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the backbone takes of the arguments that trainers add."""
    return {name: kwargs[name] for name in ("output_hidden_states", "inputs_embeds") if name in kwargs}
