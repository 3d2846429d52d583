"""The original's classes on the package's network: ChatGLMModel and ChatGLMForConditionalGeneration.

Module and parameter names, arguments and the shapes of outputs are the original's (spec/chatglm-6b.md §3.7, §3.8). The
arithmetic is `chatglm.model`'s; loading and saving are transformers'.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.utils import logging

from ..config import ModelConfig
from ..model.attention import Attend, plain_attention
from ..model.glm import GLM, Network
from ..model.linear import Linear
from ..quantization import QuantizedEmbedding, QuantizedLinear, swap_as_described
from .attention import fused_attention, recording_attention
from .cache import CacheForNetwork, ChatGLMCache, as_cache, held_tokens
from .configuration import ChatGLMConfig
from .conversation import Conversation
from .generation import Generation, ScoreGuard
from .inputs import first_pass, later_pass
from .loading import DTYPE_KEY, TIED_WEIGHTS
from .outputs import ChatGLMModelOutput, ChatGLMOutput, next_token_loss
from .pretrained import ChatGLMPreTrainedModel

logger = logging.get_logger("transformers.chatglm")


class ChatGLMModel(ChatGLMPreTrainedModel, Network):
    """Embedding, layers and final norm; `prefix_encoder` when the config has `pre_seq_len`."""

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True) -> None:
        super().__init__(config)
        self.build(config.description)
        self.has_dropout = True  # PEFT may put some into the layers
        if config.pre_seq_len is not None:
            self._keep_in_fp32_modules = [*self._keep_in_fp32_modules, "prefix_encoder"]
            for part in self.prefix_encoder.modules():
                part.is_of_prefix = isinstance(part, (nn.Embedding, nn.Linear))  # type: ignore[assignment]
        self.freeze_base()
        self.post_init()

    def get_prompt(self, batch_size: int, device: Any = None, dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
        """The prefix as the original has it: for each layer [2 (key, value), prefix, batch, heads, head_dim]."""
        pairs = self.prefix_encoder.key_values(batch_size, dtype)
        return tuple(torch.stack(pair).permute(0, 3, 1, 2, 4).to(device or self.device) for pair in pairs)

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cache: Any = None,
    ) -> ChatGLMModelOutput | tuple[Any, ...]:
        """One pass.

        input_ids        int64 [batch, query], or inputs_embeds [batch, query, hidden]
        position_ids     int64 [batch, 2, query] ([batch, query] in 1-D); needed beside past_key_values
        attention_mask   bool [batch or 1, 1, query, key], True = blocked, or [batch, tokens], 1 = real token
        past_key_values  a transformers Cache or the original's tuple; `cache` is the same under its newer name
        Raises ValueError naming the row and id when mask and positions cannot be found in the ids.
        """
        past = cache if cache is not None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        queries = (input_ids if input_ids is not None else inputs_embeds).shape[1]  # type: ignore[union-attr]
        held = held_tokens(past)
        if held:
            prefix = self.description.pre_seq_len or 0
            inputs = later_pass(attention_mask, position_ids, queries, held, prefix)
        else:
            inputs = first_pass(input_ids, attention_mask, position_ids, self.description, queries)
        past = self._cache(past, use_cache)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states

        hidden_states: list[Tensor] = []
        weights: list[Tensor] = []
        device = self.final_layernorm.weight.device if input_ids is None else input_ids.device
        hidden = self.run(
            input_ids,
            inputs.positions.to(device),
            None if inputs.blocked is None else inputs.blocked.to(device),
            None if past is None else CacheForNetwork(past),
            embeddings=inputs_embeds,
            attend=recording_attention(weights) if output_attentions else self._attend(device),
            keep_hidden=hidden_states if output_hidden else None,
        )
        last = hidden.transpose(0, 1)  # [tokens, batch, hidden], the original's order
        output = ChatGLMModelOutput(
            last_hidden_state=last,
            cache=past,
            hidden_states=(*(state.transpose(0, 1) for state in hidden_states), last) if output_hidden else None,
            attentions=tuple(weights) if output_attentions else None,
        )
        return output if return_dict or return_dict is None else output.to_tuple()

    def _cache(self, past: Any, use_cache: bool | None) -> Any:
        """The cache of this pass: the one given, a new one, or None."""
        if self.gradient_checkpointing and self.training:
            return None if not held_tokens(past) else as_cache(past)
        wanted = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if past is not None and (held_tokens(past) or hasattr(past, "get_seq_length")):
            return as_cache(past)
        return ChatGLMCache() if wanted else None

    def _attend(self, device: torch.device) -> Attend:
        """PyTorch's fused attention on accelerators, the plain one on a CPU or with attn_implementation="eager"."""
        is_fused = getattr(self.config, "_attn_implementation", None) == "sdpa" and device.type != "cpu"
        return fused_attention if is_fused else plain_attention


class BatchFirst:
    """ChatGLMModel with `last_hidden_state` [batch, tokens, hidden]; anything else is the model's."""

    def __init__(self, model: ChatGLMModel) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> ChatGLMModelOutput:
        output = self._model(*args, **kwargs)
        output["last_hidden_state"] = output.last_hidden_state.transpose(0, 1)
        return cast(ChatGLMModelOutput, output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class ChatGLMForConditionalGeneration(Conversation, Generation, ChatGLMPreTrainedModel, GenerationMixin):
    """The language model under the original's name, with `chat`, `stream_chat`, `generate` and `quantize`."""

    _tied_weights_keys = TIED_WEIGHTS

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True) -> None:
        super().__init__(config)
        description = config.description
        device = torch.empty(0).device  # transformers may build under `torch.device("meta")`
        with torch.device("meta" if description.quantization_bit else device):
            self.transformer = ChatGLMModel(config)
            self.lm_head: nn.Module = Linear(config.hidden_size, config.vocab_size, bias=False)
        if description.quantization_bit:
            self._swap(description)
            self.to_empty(device=device)
        if config.pre_seq_len is not None:
            self._keep_in_fp32_modules = [*self._keep_in_fp32_modules, "prefix_encoder"]
        self.post_init()
        self.freeze_base()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers: safetensors under the original's names, config.json without links to code."""
        result = super().save_pretrained(save_directory, *args, **kwargs)
        if isinstance(self.transformer.word_embeddings, QuantizedEmbedding):
            # transformers before 5 takes the dtype from the first parameter, here a norm that stays fp32.
            setattr(self.config, DTYPE_KEY, self.dtype)
            self.config.save_pretrained(save_directory)
        return result

    @property
    def base_model(self) -> Any:
        """The part without the head. Whoever put another forward into this object (TRL's fused head) gets it with
        hidden states batch first, as transformers' own models have them.
        """
        return BatchFirst(self.transformer) if "forward" in self.__dict__ else self.transformer

    # Embedding and head

    def get_input_embeddings(self) -> nn.Module:
        table: nn.Module = self.transformer.word_embeddings
        return table

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.lm_head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def tie_weights(self, missing_keys: set[str] | None = None, *args: Any, **kwargs: Any) -> None:
        """Let the head share the embedding's weight, quantised or not. Newer versions pass what a checkpoint lacked.

        transformers' own rule depends on its version: some keep a stored head apart, and none ties buffers.
        """
        if not self.config.tie_word_embeddings:
            return
        table, head = self.transformer.word_embeddings, self.lm_head
        if isinstance(table, QuantizedEmbedding) and isinstance(head, QuantizedLinear):
            head.tie(table)
        else:
            head.weight = table.weight
            head.out_features = table.num_embeddings
        if missing_keys is not None:
            missing_keys -= {"lm_head.weight", "lm_head.weight_scale"}

    # Forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cache: Any = None,
        logits_to_keep: int = 0,
        score_guard: ScoreGuard | None = None,
    ) -> ChatGLMOutput | tuple[Any, ...]:
        """One pass; arguments as for ChatGLMModel.

        labels          int64 [batch, tokens]; position i is scored against label i + 1, -100 is left out
        logits_to_keep  compute scores of only the last tokens; 0: of all
        score_guard     set by `generate`: what to do about scores that are not finite
        """
        output = self.transformer(
            input_ids,
            position_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            cache=cache,
        )
        hidden = output.last_hidden_state.transpose(0, 1)  # [batch, tokens, hidden]
        logits = self.lm_head(hidden[:, -logits_to_keep:] if labels is None else hidden)
        if score_guard is not None:
            logits = score_guard(logits)
        loss = None if labels is None else next_token_loss(logits, labels).to(hidden.dtype)
        result = ChatGLMOutput(
            loss=loss,
            logits=logits,
            cache=output.cache,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if return_dict or return_dict is None else result.to_tuple()

    # Quantisation

    def quantize(
        self,
        bits: int,
        quantize_embeddings: bool = False,
        use_quantization_cache: bool = False,
        empty_init: bool = False,
        **kwargs: Any,
    ) -> ChatGLMForConditionalGeneration:
        """Turn the linears into INT8 or INT4 in the original's packing, in place and on any device; returns the model.

        bits                 8 or 4; 0 leaves the model as it is
        quantize_embeddings  also the embedding and the head
        The other arguments of the original are accepted and have no effect. A model that is quantised stays as it is.
        Raises QuantizationError naming the weight that cannot be quantised.
        """
        if bits == 0:
            return self
        if self.config.quantization_bit:
            logger.info("Already quantized.")
            return self
        plain: ModelConfig = self.transformer.description
        self._swap(plain.quantized(bits, 0, bits if quantize_embeddings else 0))
        self.config.quantization_bit = bits
        self.config.quantization_embeddings = quantize_embeddings
        self.transformer.config.quantization_bit = bits
        self.transformer.config.quantization_embeddings = quantize_embeddings
        return self

    def _swap(self, wanted: ModelConfig) -> None:
        """Linears, and embedding and head where `wanted` says so, into its weight format."""
        plain: ModelConfig = self.transformer.description
        view = GLM.__new__(GLM)  # the same modules under the package's own class, which swapping works on
        nn.Module.__init__(view)
        view.config, view.transformer, view.lm_head = plain, self.transformer, cast(Linear, self.lm_head)
        swap_as_described(view, wanted)
        self.transformer.config = self.config
        self.lm_head = view.lm_head
        if wanted.embedding_bits and plain.tied_head:
            # transformers' own tying knows parameters only, and these are buffers.
            self._tied_weights_keys = type(TIED_WEIGHTS)()
            self.all_tied_weights_keys: dict[str, str] = {}
            self._keys_to_ignore_on_load_missing = [*self._keys_to_ignore_on_load_missing, r"^lm_head\."]
            self._keys_to_ignore_on_save = ["lm_head.weight", "lm_head.weight_scale"]
