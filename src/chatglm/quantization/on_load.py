"""Weights into another format as they arrive from a checkpoint, one at a time: a `transform` for checkpoint.load_into.

Memory is that of the result and one weight, whatever the checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..config import ModelConfig
from .group_format import dequantize_groups, quantize_groups
from .row_format import check_bits, dequantize_rows, quantize_rows
from .swap import LINEARS, named

Transform = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]

SCALE = "_scale"
PART_BYTES = 1 << 20
"""Codes of quantised weights that are widened at once."""

TABLES = ("transformer.word_embeddings.weight", "lm_head.weight")


def quantize_on_load(bits: int, embeddings: bool = False, *, group_size: int = 0, embedding_bits: int = 0) -> Transform:
    """Plain weights are quantised as they arrive. The model must be swapped already, with the same arguments."""
    check_bits(bits)

    def transform(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        wanted = bits_of(name, bits, (embedding_bits or bits) if embeddings else 0)
        return shrunk(name, tensor, wanted, group_size)

    return transform


def convert_on_load(stored: ModelConfig, wanted: ModelConfig) -> Transform | None:
    """From the format of a checkpoint to that of a model, both plain or quantised; None where they are the same.

    Codes wait for their scales, or scales for their codes: a file may hold either first.
    """
    if weight_format(stored) == weight_format(wanted):
        return None
    waiting: dict[str, Tensor] = {}

    def transform(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        weight = name.removesuffix(SCALE)
        bits = bits_of(weight, stored.quantization_bit, stored.embedding_bits)
        wanted_bits = bits_of(weight, wanted.quantization_bit, wanted.embedding_bits)
        is_kept = bits == wanted_bits and stored.quantization_group_size == wanted.quantization_group_size
        if not bits or is_kept:
            yield from (
                [(name, tensor)] if is_kept else shrunk(name, tensor, wanted_bits, wanted.quantization_group_size)
            )
            return
        waiting[name] = tensor
        if weight in waiting and weight + SCALE in waiting:
            codes, scale = waiting.pop(weight), waiting.pop(weight + SCALE)
            parts = widened_parts(codes, scale, bits, stored.quantization_group_size)
            yield from shrunk_parts(weight, parts, wanted_bits, wanted.quantization_group_size)

    return transform


def weight_format(config: ModelConfig) -> tuple[int, int, int]:
    """Bits of the linears, group size, bits of embedding and head."""
    return config.quantization_bit, config.quantization_group_size, config.embedding_bits


def bits_of(name: str, linears: int, tables: int) -> int:
    """Bits of the tensor `name` in a format with so many bits for linears and tables; 0 for a float."""
    if name in TABLES:
        return tables
    return linears if name.endswith(tuple(f".{linear}.weight" for linear in LINEARS)) else 0


def widened_parts(codes: Tensor, scale: Tensor, bits: int, group_size: int) -> Iterator[Tensor]:
    """Weights in fp32, some rows at a time: [rows, columns]."""
    expand = dequantize_groups if group_size else dequantize_rows
    step = max(1, PART_BYTES // codes.shape[1])
    for start in range(0, len(codes), step):
        yield expand(codes[start : start + step], scale[start : start + step], bits, torch.float32)


def shrunk_parts(name: str, parts: Iterator[Tensor], bits: int, group_size: int) -> Iterator[tuple[str, Tensor]]:
    """`shrunk` of a weight that comes some rows at a time."""
    made: dict[str, list[Tensor]] = {}
    for part in parts:
        for made_name, tensor in shrunk(name, part, bits, group_size):
            made.setdefault(made_name, []).append(tensor)
    for made_name, tensors in made.items():
        yield made_name, torch.cat(tensors)


def shrunk(name: str, weight: Tensor, bits: int, group_size: int) -> Iterator[tuple[str, Tensor]]:
    """Codes and scales under their names, or the weight itself where `bits` is 0.

    Raises QuantizationError with the name of a weight that cannot be quantised.
    """
    if not bits:
        yield name, weight
        return
    with named(name):
        codes, scale = quantize_groups(weight, bits, group_size) if group_size else quantize_rows(weight, bits)
    yield name, codes
    yield name + SCALE, scale
