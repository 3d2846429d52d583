"""ModelConfig: the one description that ChatGLM-6B, GLM and GLM-130B are values of.

Architectural differences are fields, not subclasses. Reading and writing the original `config.json` is one function
each; nothing in the file is ever executed (`auto_map` is bookkeeping).
"""

from __future__ import annotations

import difflib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError

PositionEncoding = Literal["rotary_2d", "rotary_1d", "learned_2d"]
NormOrder = Literal["post_scaled", "pre"]
QKVLayout = Literal["per_head", "block"]
MLPKind = Literal["gelu_tanh", "geglu"]
AnswerPositions = Literal["mask", "running"]
Era = Literal["pre-slim", "slim"]

CHATGLM_RESIDUAL_SCALE = math.sqrt(2 * 28)
"""√56: the original's blocks keep `num_layers=28` for themselves, so every original-format checkpoint has it."""

IMAGE_TOKENS = 20_000
"""Ids 0 … 19,999 of the pre-slim era were image tokens; the slim era dropped them."""

GROUP_SIZE = 64
"""Columns that share a scale in the project's own format, unless a model's sizes ask for fewer."""

EMBEDDING_BITS = 8
"""Embedding and head of the project's own format, also beside INT4 linears: measured on the embedded model, INT4 there
costs as much perplexity as INT4 in all linears together (docs/quantization.md)."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, switches and special ids of one model. The defaults are ChatGLM-6B (v0.1.0, v1.1.0).

    vocab_size           rows of the stored embedding; the tokenizer may have fewer pieces
    residual_scale       factor of the normalised input in the residual sum (1 for norm_order "pre")
    answer_positions     rotary_1d only: where generated tokens stand, at the `[gMASK]` (the original's cached decode)
                         or running on behind the context (GLM-130B)
    quantization_bit     0, 4 or 8: linears stored in the original's row-wise packing, or in groups
    quantization_group_size  weights that share a scale in the project's own format; 0 is the original's, a whole row
    quantization_embeddings  embedding and head are quantised too, to quantization_embedding_bit (0: as the linears)
    pre_seq_len          length of a P-tuning v2 prefix, or None

    Raises ConfigError when sizes or ids are impossible. Source: GLM (ACL 2022) §2, GLM-130B (ICLR 2023) §2.
    """

    vocab_size: int = 130_528
    hidden_size: int = 4_096
    num_layers: int = 28
    num_heads: int = 32
    inner_hidden_size: int = 16_384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2_048

    position_encoding: PositionEncoding = "rotary_2d"
    rotary_base: float = 10_000.0
    answer_positions: AnswerPositions = "mask"
    norm_order: NormOrder = "post_scaled"
    residual_scale: float = CHATGLM_RESIDUAL_SCALE
    qkv_layout: QKVLayout = "per_head"
    mlp: MLPKind = "gelu_tanh"
    tied_head: bool = True

    bos_token_id: int = 130_004
    eos_token_id: int = 130_005
    mask_token_id: int = 130_000
    gmask_token_id: int = 130_001
    pad_token_id: int = 3

    quantization_bit: int = 0
    quantization_group_size: int = 0
    quantization_embeddings: bool = False
    quantization_embedding_bit: int = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    torch_dtype: str = "float16"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "inner_hidden_size",
            "max_sequence_length",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"config: `{name}` is {value!r}; it must be a positive whole number")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"config: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        rotary_parts = {"rotary_2d": 4, "rotary_1d": 2, "learned_2d": 1}
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"config: `{name}` is {getattr(self, name)!r}; allowed: {', '.join(map(str, allowed))}"
                )
        if self.head_dim % rotary_parts[self.position_encoding]:
            raise ConfigError(
                f"config: head size {self.head_dim} (hidden_size {self.hidden_size} / {self.num_heads} heads) is not a "
                f"multiple of {rotary_parts[self.position_encoding]}, which {self.position_encoding} needs"
            )
        if not 0 < self.layernorm_epsilon < 1:
            raise ConfigError(f"config: `layernorm_epsilon` is {self.layernorm_epsilon!r}; it must lie between 0 and 1")
        for name in _ID_NAMES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < self.vocab_size:
                raise ConfigError(f"config: `{name}` is {value!r}, outside the {self.vocab_size} rows of `vocab_size`")
        distinct = {self.bos_token_id, self.eos_token_id, self.mask_token_id, self.gmask_token_id}
        if len(distinct) < 4:
            ids = ", ".join(f"{name} {getattr(self, name)}" for name in _ID_NAMES)
            raise ConfigError(f"config: special ids must differ; found {ids}")
        self._check_group_size()
        if self.pre_seq_len is not None and self.pre_seq_len < 1:
            raise ConfigError(f"config: `pre_seq_len` is {self.pre_seq_len!r}; it must be positive or absent")

    def _check_group_size(self) -> None:
        size = self.quantization_group_size
        if size % 8 or size < 0:
            raise ConfigError(f"config: `quantization_group_size` is {size!r}; it must be 0 or a multiple of 8")
        for name in ("hidden_size", "inner_hidden_size") if size else ():
            columns = getattr(self, name)
            if columns % size:
                raise ConfigError(f"config: `quantization_group_size` {size} does not divide `{name}` {columns}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def era(self) -> Era:
        """Which id space the checkpoint uses: pre-slim ids lie 20,000 above the slim ones."""
        return "pre-slim" if self.bos_token_id - IMAGE_TOKENS >= 130_000 else "slim"

    @property
    def image_tokens(self) -> int:
        """What is added to every SentencePiece id: 20,000 in the pre-slim era, else 0."""
        return IMAGE_TOKENS if self.era == "pre-slim" else 0

    @property
    def num_parameters(self) -> int:
        """Parameters by arithmetic, tied head counted once, a P-tuning prefix not counted.

        6,173,286,400 for ChatGLM-6B (spec/chatglm-6b.md §1.1).
        """
        hidden, inner = self.hidden_size, self.inner_hidden_size
        first = inner * 2 if self.mlp == "geglu" else inner
        layer = 4 * hidden * hidden + 4 * hidden + first * (hidden + 1) + hidden * (inner + 1) + 4 * hidden
        positions = 2 * (self.max_sequence_length + 1) * hidden if self.position_encoding == "learned_2d" else 0
        heads = 1 if self.tied_head else 2
        return heads * self.vocab_size * hidden + positions + self.num_layers * layer + 2 * hidden

    @property
    def embedding_bits(self) -> int:
        """Bits of embedding and head, 0 where they are floats."""
        return (self.quantization_embedding_bit or self.quantization_bit) if self.quantization_embeddings else 0

    def quantized(self, bits: int, group_size: int | None = None, embedding_bits: int | None = None) -> ModelConfig:
        """The same model with other weights: by default the project's own INT8 or INT4, whatever it has now.

        bits            8 or 4; 0 for floats
        group_size      0 is the original's row-wise packing; None: GROUP_SIZE, or the next smaller one that divides
                        every matrix (0 where none does)
        embedding_bits  0 leaves embedding and head as floats, as the original does; None: EMBEDDING_BITS
        Raises ConfigError for a group size that does not divide hidden_size and inner_hidden_size.
        """
        if not bits:
            return replace(
                self,
                quantization_bit=0,
                quantization_group_size=0,
                quantization_embeddings=False,
                quantization_embedding_bit=0,
            )
        if group_size is None:
            sizes = (GROUP_SIZE >> halvings for halvings in range(4))
            fitting = (size for size in sizes if not (self.hidden_size % size or self.inner_hidden_size % size))
            group_size = next(fitting, 0)
        embedding_bits = EMBEDDING_BITS if embedding_bits is None else embedding_bits
        return replace(
            self,
            quantization_bit=bits,
            quantization_group_size=group_size,
            quantization_embeddings=embedding_bits > 0,
            quantization_embedding_bit=0 if embedding_bits == bits else embedding_bits,
        )

    def slim(self) -> ModelConfig:
        """The same model with the 20,000 image rows dropped and every id moved down (pre-slim only)."""
        if self.era != "pre-slim":
            return self
        moved = {name: getattr(self, name) - IMAGE_TOKENS for name in _ID_NAMES}
        return replace(self, vocab_size=self.vocab_size - IMAGE_TOKENS, **moved)


_ID_NAMES = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "position_encoding": ("rotary_2d", "rotary_1d", "learned_2d"),
    "answer_positions": ("mask", "running"),
    "norm_order": ("post_scaled", "pre"),
    "qkv_layout": ("per_head", "block"),
    "mlp": ("gelu_tanh", "geglu"),
    "quantization_bit": (0, 4, 8),
    "quantization_embedding_bit": (0, 4, 8),
}

# What the original class assumes for a key that config.json lacks: the values of the first (pre-slim) release.
_ORIGINAL_DEFAULTS: dict[str, Any] = {
    "vocab_size": 150_528,
    "hidden_size": 4_096,
    "num_layers": 28,
    "num_attention_heads": 32,
    "inner_hidden_size": 16_384,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 2_048,
    "position_encoding_2d": True,
    "bos_token_id": 150_004,
    "eos_token_id": 150_005,
    "quantization_bit": 0,
    "quantization_embeddings": False,
    "pre_seq_len": None,
    "prefix_projection": False,
    "torch_dtype": "float16",
}

# Switches beyond the original's keys, written only where they differ from ChatGLM's values.
_OWN_KEYS = (
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

_BOOKKEEPING = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "adapters",
        "add_cross_attention",
        "architectures",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "custom_pipelines",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "ignore_index",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "layer_types",
        "length_penalty",
        "license",
        "max_length",
        "min_length",
        "model_type",
        "name_or_path",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_hidden_layers",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    }
)

# Keys of other models under the same `model_type`: the value that means "as in ChatGLM-6B", anything else is refused.
_FOREIGN: dict[str, Any] = {
    "multi_query_attention": False,
    "multi_query_group_num": None,
    "rmsnorm": False,
    "apply_residual_connection_post_layernorm": None,
    "add_qkv_bias": True,
    "add_bias_linear": True,
    "ffn_hidden_size": None,
    "kv_channels": None,
    "padded_vocab_size": None,
    "rope_ratio": 1,
    "post_layer_norm": True,
    "original_rope": True,
    "interleaved_qkv": None,
    "num_key_value_heads": None,
    "hidden_act": "gelu",
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "quantization_config": None,
}


def from_original(raw: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
    """ModelConfig from the keys of an original `config.json` (three eras; spec/chatglm-6b.md §2).

    Bookkeeping keys are ignored. An unknown key is one UserWarning by name. Raises ConfigError for a key that would
    change the arithmetic, a wrong type, or impossible values; the message names `where`.
    """
    model_type = raw.get("model_type", "chatglm")
    if model_type != "chatglm":
        raise ConfigError(f"{where}: model_type is {model_type!r}; this package reads 'chatglm'")
    known = {*_ORIGINAL_DEFAULTS, *_OWN_KEYS, *_ID_NAMES, "tie_word_embeddings"}
    for key, value in raw.items():
        if key in _FOREIGN:
            if value != _FOREIGN[key] and value is not None:
                raise ConfigError(
                    f"{where}: `{key}` is {value!r}; that is another architecture under the same model_type",
                    cure="use a ChatGLM-6B checkpoint; ChatGLM2 and later load with transformers",
                )
        elif key not in known and key not in _BOOKKEEPING:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            warnings.warn(f"{where}: unknown key `{key}` is ignored{hint}", UserWarning, stacklevel=2)

    values = {**_ORIGINAL_DEFAULTS, **{key: raw[key] for key in known if key in raw}}
    if raw.get("dtype") is not None and "torch_dtype" not in raw:
        values["torch_dtype"] = raw["dtype"]  # transformers 5 renamed the key
    own = {name: values[name] for name in _OWN_KEYS if name in values}
    own.setdefault("position_encoding", "rotary_2d" if values["position_encoding_2d"] else "rotary_1d")
    bos = values["bos_token_id"]
    pre_slim_pad = IMAGE_TOKENS + 3  # the tokenizer's <pad>; the first config.json files left the key out
    try:
        return ModelConfig(
            **{name: values[name] for name in _SAME_NAME},
            **own,
            num_heads=values["num_attention_heads"],
            tied_head=values.get("tie_word_embeddings", True),
            mask_token_id=values.get("mask_token_id", bos - 4),
            gmask_token_id=values.get("gmask_token_id", bos - 3),
            pad_token_id=values.get("pad_token_id", pre_slim_pad if bos == 150_004 else 3),
        )
    except ConfigError as error:
        raise ConfigError(error.message.replace("config:", f"{where}:", 1), cure=error.cure) from error
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "inner_hidden_size",
    "layernorm_epsilon",
    "max_sequence_length",
    "bos_token_id",
    "eos_token_id",
    "quantization_bit",
    "quantization_embeddings",
    "pre_seq_len",
    "prefix_projection",
    "torch_dtype",
)


def to_original(config: ModelConfig) -> dict[str, Any]:
    """The keys of an original `config.json`; own switches only where they differ from ChatGLM's values."""
    raw: dict[str, Any] = {"architectures": ["ChatGLMModel"], "model_type": "chatglm"}
    raw |= {name: getattr(config, name) for name in (*_SAME_NAME, *_ID_NAMES)}
    raw["num_attention_heads"] = config.num_heads
    raw["position_encoding_2d"] = config.position_encoding == "rotary_2d"
    raw["use_cache"] = True
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    for name in _OWN_KEYS:
        implied = name == "position_encoding" and config.position_encoding != "learned_2d"
        if getattr(config, name) != defaults[name] and not implied:
            raw[name] = getattr(config, name)
    if not config.tied_head:
        raw["tie_word_embeddings"] = False
    if config.pre_seq_len is None:
        del raw["pre_seq_len"], raw["prefix_projection"]
    if not config.quantization_bit:
        del raw["quantization_bit"], raw["quantization_embeddings"]
    return raw


def read_config(path: str | Path) -> ModelConfig:
    """ModelConfig from a `config.json` file. Raises ConfigError naming the file when it is missing or not JSON."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file", cure="a checkpoint folder holds config.json beside its weights"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})", cure="download config.json again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a JSON {type(raw).__name__}, not an object")
    return from_original(raw, where=str(path))
