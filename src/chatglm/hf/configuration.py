"""ChatGLMConfig: the original's config keys, for transformers.

The keys are only stored here; `description` turns them into the ModelConfig that the network is built from, with all of
its checks. Code that a config.json points to (`auto_map`) is dropped when it is read.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from ..config import ModelConfig, from_original

ORIGINAL_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "inner_hidden_size",
    "layernorm_epsilon",
    "max_sequence_length",
    "position_encoding_2d",
    "bos_token_id",
    "eos_token_id",
    "mask_token_id",
    "gmask_token_id",
    "pad_token_id",
    "quantization_bit",
    "quantization_embeddings",
    "pre_seq_len",
    "prefix_projection",
    "tie_word_embeddings",
)
"""What decides the arithmetic in an original `config.json` (spec/chatglm-6b.md §2)."""

OWN_KEYS = (
    "rotary_base",
    "answer_positions",
    "norm_order",
    "residual_scale",
    "qkv_layout",
    "mlp",
    "position_encoding",
    "quantization_group_size",
    "quantization_embedding_bit",
)
"""Switches beyond the original's: of other members of the family and of the own weight format; kept where set."""


class ChatGLMConfig(PretrainedConfig):
    """Sizes and switches of a ChatGLM-6B checkpoint under the original's names.

    The defaults are the original class's, which are those of the first release: 150,528 rows and ids above 150,000.
    Every released `config.json` names its own. `mask_token_id`, `gmask_token_id` and `pad_token_id` follow from
    `bos_token_id` where a file lacks them.
    Raises ConfigError for impossible values and for the config of a later generation (ChatGLM2 and on).
    """

    model_type = "chatglm"
    attribute_map = {  # noqa: RUF012 - transformers declares it as a plain class attribute
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 150_528,
        hidden_size: int = 4_096,
        num_layers: int = 28,
        num_attention_heads: int = 32,
        layernorm_epsilon: float = 1e-5,
        use_cache: bool = True,
        bos_token_id: int = 150_004,
        eos_token_id: int = 150_005,
        mask_token_id: int | None = None,
        gmask_token_id: int | None = None,
        pad_token_id: int | None = None,
        max_sequence_length: int = 2_048,
        inner_hidden_size: int = 16_384,
        position_encoding_2d: bool = True,
        quantization_bit: int = 0,
        quantization_embeddings: bool = False,
        pre_seq_len: int | None = None,
        prefix_projection: bool = False,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("auto_map", None)  # names Python files of the checkpoint; they are never run
        extra = {key: value for key, value in kwargs.items() if key not in _base_attributes()}
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.layernorm_epsilon = layernorm_epsilon
        self.use_cache = use_cache
        self.mask_token_id = mask_token_id
        self.gmask_token_id = gmask_token_id
        self.max_sequence_length = max_sequence_length
        self.inner_hidden_size = inner_hidden_size
        self.position_encoding_2d = position_encoding_2d
        self.quantization_bit = quantization_bit
        self.quantization_embeddings = quantization_embeddings
        self.pre_seq_len = pre_seq_len
        self.prefix_projection = prefix_projection
        shared: dict[str, Any] = {
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "tie_word_embeddings": tie_word_embeddings,
        }
        super().__init__(**shared, **kwargs)
        for key, value in shared.items():  # not every version of transformers keeps them in the base class
            setattr(self, key, value)
        description = from_original({**extra, **self._arithmetic()})
        self.mask_token_id = description.mask_token_id
        self.gmask_token_id = description.gmask_token_id
        self.pad_token_id = description.pad_token_id

    def _arithmetic(self) -> dict[str, Any]:
        """The keys that describe the network, without those that are not set."""
        keys = {key: getattr(self, key, None) for key in (*ORIGINAL_KEYS, *OWN_KEYS)}
        return {key: value for key, value in keys.items() if value is not None}

    @property
    def description(self) -> ModelConfig:
        """The network as the rest of the package describes it. Raises ConfigError when it cannot be."""
        return from_original(self._arithmetic())

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: this class is found by name, and its source is not copied beside saved configs."""


_BASE_ATTRIBUTES: set[str] = set()
_LOADING_KEYS = ("attn_implementation", "experts_implementation", "name_or_path", "torch_dtype", "dtype")


def _base_attributes() -> set[str]:
    """Keys that transformers itself puts into any config: nothing to warn about."""
    if not _BASE_ATTRIBUTES:
        _BASE_ATTRIBUTES.update(PretrainedConfig().to_dict(), vars(PretrainedConfig()), _LOADING_KEYS)
    return _BASE_ATTRIBUTES
