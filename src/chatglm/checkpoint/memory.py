"""How much memory a model needs, by arithmetic alone."""

from __future__ import annotations

from typing import Final

from ..config import ModelConfig
from .layout import expected_tensors

DTYPES: Final = ("fp32", "fp16", "bf16", "int8", "int4")
_FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the weights held in `dtype` (fp32, fp16, bf16, int8, int4), the tied head once.

    int8 and int4: the checkpoint's own form where it is stored so, else the one that loading would make of it
    (ModelConfig.quantized). What is not quantised is fp16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)}")
    bits = {"int8": 8, "int4": 4}.get(dtype, 0)
    form = config if bits and bits == config.quantization_bit else config.quantized(bits)
    item = _FLOAT_BYTES.get(dtype, 2)
    return sum(
        spec.elements * (1 if spec.is_codes else item)
        for spec in expected_tensors(form).values()
        if not spec.is_optional
    )


def cache_bytes(config: ModelConfig, dtype: str, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens: 458,752 a token for ChatGLM-6B in fp16."""
    return 2 * config.num_layers * config.hidden_size * tokens * _FLOAT_BYTES.get(dtype, 2)


def estimate_memory(config: ModelConfig, dtype: str, *, tokens: int | None = None) -> int:
    """Bytes to hold the weights in `dtype` and the KV cache of one sequence of `tokens` (default: the longest).

    13.29 GB for ChatGLM-6B in fp16: 12.35 GB of weights and 0.94 GB of cache. What one step computes with comes on top.
    """
    tokens = config.max_sequence_length if tokens is None else tokens
    return weight_bytes(config, dtype) + cache_bytes(config, dtype, tokens)
