"""Which tensors a model of a given description has: names, shapes, kinds, and the shards of the original release."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..config import IMAGE_TOKENS, ModelConfig

FLOATS = ("float16", "bfloat16", "float32", "float64")
EMBEDDING, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
PREFIX = "transformer.prefix_encoder."
SCORE = "score."
"""The head of a reward model, in the place of the language model's."""
ROTARY = ".attention.rotary_emb.inv_freq"
"""A buffer that the original stores with every layer and ignores when it loads."""

LAYER_LINEARS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
LARGEST_ORIGINAL_SHARD = 2_000_000_000


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must be: its shape as stored, the dtypes it may have, and whether it may be left out."""

    shape: tuple[int, ...]
    kinds: tuple[str, ...] = FLOATS
    is_optional: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_codes(self) -> bool:
        """Whether it holds quantised weights, a byte an element."""
        return self.kinds in (("int8",), ("uint8",))


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the model by its name in the checkpoint, in the original's order (spec/chatglm-6b.md §1.1, §6.2).

    A tied `lm_head` is optional. Quantised weights have a `weight_scale` beside: int8 codes and a scale a row, or with
    a group size a scale a group, and INT4 as uint8 (docs/quantization.md).
    """
    hidden, rows = config.hidden_size, config.vocab_size
    group_size = config.quantization_group_size
    specs: dict[str, TensorSpec] = {}

    def matrix(name: str, out: int, columns: int, bits: int, is_optional: bool = False) -> None:
        if bits:
            kind = "uint8" if group_size and bits == 4 else "int8"
            scales = (out, columns // group_size) if group_size else (out,)
            specs[f"{name}.weight"] = TensorSpec((out, columns * bits // 8), (kind,), is_optional)
            specs[f"{name}.weight_scale"] = TensorSpec(scales, FLOATS, is_optional)
        else:
            specs[f"{name}.weight"] = TensorSpec((out, columns), FLOATS, is_optional)

    def norm(name: str) -> None:
        specs[f"{name}.weight"] = specs[f"{name}.bias"] = TensorSpec((hidden,))

    matrix("transformer.word_embeddings", rows, hidden, config.embedding_bits)
    if config.position_encoding == "learned_2d":
        for table in ("position_embeddings", "block_position_embeddings"):
            matrix(f"transformer.{table}", config.max_sequence_length + 1, hidden, 0)
    shapes = linear_shapes(config)
    for layer in range(config.num_layers):
        prefix = f"transformer.layers.{layer}"
        for part in ("input_layernorm", *LAYER_LINEARS[:2], "post_attention_layernorm", *LAYER_LINEARS[2:]):
            if part in shapes:
                matrix(f"{prefix}.{part}", *shapes[part], config.quantization_bit)
                specs[f"{prefix}.{part}.bias"] = TensorSpec(shapes[part][:1])
            else:
                norm(f"{prefix}.{part}")
    norm("transformer.final_layernorm")
    specs |= {PREFIX + name: TensorSpec(shape) for name, shape in _prefix_shapes(config).items()}
    matrix("lm_head", rows, hidden, config.embedding_bits, is_optional=config.tied_head)
    return specs


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the four linears of a layer."""
    hidden, inner = config.hidden_size, config.inner_hidden_size
    widened = 2 * inner if config.mlp == "geglu" else inner
    return dict(
        zip(LAYER_LINEARS, ((3 * hidden, hidden), (hidden, hidden), (widened, hidden), (hidden, inner)), strict=True)
    )


def _prefix_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The P-tuning v2 prefix encoder (spec/chatglm-6b.md §8.1)."""
    if config.pre_seq_len is None:
        return {}
    hidden, width = config.hidden_size, 2 * config.num_layers * config.hidden_size
    if not config.prefix_projection:
        return {"embedding.weight": (config.pre_seq_len, width)}
    return {
        "embedding.weight": (config.pre_seq_len, hidden),
        "trans.0.weight": (hidden, hidden),
        "trans.0.bias": (hidden,),
        "trans.2.weight": (width, hidden),
        "trans.2.bias": (width,),
    }


def stored_bytes(name: str, spec: TensorSpec, norm_bytes: int = 4) -> int:
    """Bytes of a tensor as the original stores it: norms fp32, codes a byte, everything else fp16."""
    if spec.is_codes:
        return spec.elements
    return spec.elements * (norm_bytes if "layernorm" in name else 2)


def original_names(config: ModelConfig) -> dict[str, TensorSpec]:
    """The names of an original checkpoint in its order: expected_tensors, the head too, and a rotary buffer a layer."""
    frequencies = config.head_dim // (4 if config.position_encoding == "rotary_2d" else 2)
    names: dict[str, TensorSpec] = {}
    for name, spec in expected_tensors(config).items():
        names[name] = spec
        if name.endswith(".input_layernorm.bias"):
            names[name.replace(".input_layernorm.bias", ROTARY)] = TensorSpec((frequencies,))
    return names


def original_shards(config: ModelConfig, largest: int | None = None) -> tuple[list[list[str]], int]:
    """Tensor names of each shard of the original release, and its stale `total_size`.

    The release was cut into shards of at most 2,000 MB while it still had 20,000 more rows; slimming kept the cut, and
    the size in the index (spec/chatglm-6b.md §9). A smaller model is cut in proportion, unless `largest` says bytes.
    """
    names = original_names(config)
    rows = 0 if config.era == "pre-slim" else IMAGE_TOKENS

    def before_slimming(name: str) -> int:
        extra = rows * math.prod(names[name].shape[1:]) if name.startswith(("lm_head", EMBEDDING[:-7])) else 0
        return stored_bytes(name, names[name]) + extra * (1 if names[name].is_codes else 2)

    sizes = {name: before_slimming(name) for name in names}
    total = sum(sizes.values())
    if largest is None:
        largest = LARGEST_ORIGINAL_SHARD * total // before_slimming_of_chatglm_6b()
    return cut(sizes.items(), min(largest, LARGEST_ORIGINAL_SHARD)), total


def before_slimming_of_chatglm_6b() -> int:
    """13,744,473,856: the size that the index of every release states."""
    full = original_names(ModelConfig(vocab_size=150_528))
    return sum(stored_bytes(name, spec) for name, spec in full.items())


def cut(sizes: Iterable[tuple[str, int]], largest: int) -> list[list[str]]:
    """Names in order, cut before the sum of their sizes exceeds `largest`; a larger tensor stands alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if shards[-1] and filled + size > largest:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
