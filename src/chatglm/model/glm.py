"""The whole network: embedding → blocks → final norm → head.

Module and parameter names are the original's, so `state_dict` keys are the names in the checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig
from .attention import Attend, Cache, KeyValue, plain_attention
from .block import Block
from .linear import Embedding, LayerNorm, Linear, activation_dtype
from .prefix import PrefixEncoder
from .rotary import rotary_table


class Network:
    """Everything but the head, for an nn.Module to take on: `build` makes the parts, `run` is the pass over them.

    Apart from Transformer so that the model under transformers' names has the same parts at the same places.
    `build` sets `description`, which `run` reads. Source: GLM (ACL 2022) §2; spec/chatglm-6b.md §3.
    """

    description: ModelConfig
    training: bool
    word_embeddings: nn.Embedding
    position_embeddings: nn.Embedding
    block_position_embeddings: nn.Embedding
    layers: nn.ModuleList
    final_layernorm: LayerNorm
    prefix_encoder: PrefixEncoder

    def build(self, config: ModelConfig) -> None:
        """Make the parts under the original's names."""
        self.description = config
        self.gradient_checkpointing = False
        self.has_dropout = False  # inside a layer: its random state is then kept for the second forward
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        if config.position_encoding == "learned_2d":
            self.position_embeddings = Embedding(config.max_sequence_length + 1, config.hidden_size)
            self.block_position_embeddings = Embedding(config.max_sequence_length + 1, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        if config.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config)

    def run(
        self,
        ids: Tensor | None,
        positions: Tensor,
        blocked: Tensor | None = None,
        cache: Cache | None = None,
        *,
        embeddings: Tensor | None = None,
        attend: Attend = plain_attention,
        keep_hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [batch, query, hidden].

        ids          int64 [batch, query], or None with `embeddings` [batch, query, hidden]
        positions    int64 [batch, 2, query], or [batch, query] for rotary_1d
        blocked      bool [batch or 1, 1, query, key], True = may not look; key counts cached tokens, a P-tuning prefix
                     only if the cache already holds it. None: every token sees everything
        keep_hidden  receives the input of every layer
        """
        hidden = self.embed(ids, positions, embeddings)
        has_rotary = self.description.position_encoding != "learned_2d"
        rotary = rotary_table(positions, self.description) if has_rotary else None
        prefixes, blocked = self._prefixes(hidden, blocked, cache)
        for layer, prefix in zip(self.layers, prefixes, strict=True):
            if keep_hidden is not None:
                keep_hidden.append(hidden)
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(
                    layer, hidden, rotary, blocked, cache, prefix, attend,
                    use_reentrant=False, preserve_rng_state=self.has_dropout,
                )  # fmt: skip
            else:
                hidden = layer(hidden, rotary, blocked, cache, prefix, attend)
        output: Tensor = self.final_layernorm(hidden)
        return output

    def embed(self, ids: Tensor | None, positions: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """The input of the first layer, [batch, query, hidden], in the dtype of activations."""
        hidden: Tensor = self.word_embeddings(ids) if embeddings is None else embeddings
        hidden = hidden.to(activation_dtype(hidden.dtype, hidden.device))
        if self.description.position_encoding == "learned_2d":
            hidden = (
                hidden + self.position_embeddings(positions[:, 0]) + self.block_position_embeddings(positions[:, 1])
            )
        return hidden

    def _prefixes(
        self, hidden: Tensor, blocked: Tensor | None, cache: Cache | None
    ) -> tuple[Sequence[KeyValue | None], Tensor | None]:
        """The P-tuning prefix of each layer, once, and the mask widened over it."""
        if self.description.pre_seq_len is None or (cache is not None and cache.length > 0):
            return [None] * self.description.num_layers, blocked
        prefixes = list(self.prefix_encoder.key_values(hidden.shape[0], hidden.dtype))
        if blocked is not None:
            blocked = nn.functional.pad(blocked, (self.description.pre_seq_len, 0), value=False)
        return prefixes, blocked


class Transformer(Network, nn.Module):
    """Everything but the head, on its own."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.build(config)

    def forward(
        self,
        ids: Tensor | None,
        positions: Tensor,
        blocked: Tensor | None = None,
        cache: Cache | None = None,
        *,
        embeddings: Tensor | None = None,
        attend: Attend = plain_attention,
        keep_hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [batch, query, hidden]; arguments as for `Network.run`."""
        return self.run(ids, positions, blocked, cache, embeddings=embeddings, attend=attend, keep_hidden=keep_hidden)


class GLM(nn.Module):
    """The language model: Transformer and output head, tied to the embedding unless the config says otherwise."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()

    def tie_head(self) -> None:
        """Let the head share the embedding's weight (again, after either was replaced)."""
        if self.config.tied_head:
            self.lm_head.weight = self.transformer.word_embeddings.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 scores [..., vocab] of hidden states [..., hidden]."""
        output: Tensor = self.lm_head(hidden)
        return output.float()

    def forward(
        self, ids: Tensor, positions: Tensor, blocked: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """fp32 logits [batch, query, vocab]; arguments as for Transformer."""
        return self.logits(self.transformer(ids, positions, blocked, cache))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and of a KV cache (fp32 for fp16 weights on a CPU)."""
        return activation_dtype(self.transformer.final_layernorm.weight.dtype, self.device)

    @property
    def device(self) -> torch.device:
        return self.transformer.final_layernorm.weight.device
