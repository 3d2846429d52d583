"""An adapter into its base: a plain checkpoint that knows nothing of it, written one tensor at a time.

A weight becomes W + scaling · up · down, computed in fp32 and rounded once to the dtype it is stored in, as in PEFT's
merge. Codes of INT8 and INT4 are expanded, added to, and quantised again to the nearest, which loses a little.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint import open_checkpoint
from ...checkpoint.adapter import LoraAdapter, LowRank, open_adapter
from ...checkpoint.converting import convert, convert_ptuning
from ...checkpoint.reading import read_tensor
from ...config import ModelConfig
from ...quantization.on_load import SCALE, shrunk_parts, widened_parts

log = logging.getLogger(__name__)

REQUANTISED = (
    "INT{bits} weights are expanded, added to and quantised again to the nearest: the result is a little worse than "
    "the adapter beside its base. Merge into the fp16 base and quantise that (`chatglm quantize`) where you have it"
)


def merge_adapter(adapter: str | Path, base: str | Path, target: str | Path, **options: Any) -> Path:
    """Write base and adapter as one checkpoint; returns the folder.

    adapter  a LoRA or P-tuning folder
    options  format, dtype, max_shard_bytes, overwrite, progress of `checkpoint.convert`
    Raises CheckpointError where the two do not fit each other.
    """
    opened = open_adapter(adapter)
    if not isinstance(opened, LoraAdapter):
        return convert_ptuning(adapter, base, target, **options)
    config = open_checkpoint(base).config
    opened.check_fits(config)
    if config.quantization_bit:
        log.warning(REQUANTISED.format(bits=config.quantization_bit))
    return convert(base, target, transform=adding(opened, config), **options)


def adding(adapter: LoraAdapter, config: ModelConfig) -> Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]:
    """A transform of stored tensors: floats come back in fp32, codes with their scales. config: of the base."""
    waiting: dict[str, Tensor] = {}

    def transform(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        weight = name.removesuffix(SCALE)
        part = adapter.parts.get(weight.removesuffix(".weight"))
        if part is None or not weight.endswith(".weight"):
            yield name, tensor
            return
        if not config.quantization_bit:
            yield name, tensor.float() + delta(part)
            return
        waiting[name] = tensor
        if weight in waiting and weight + SCALE in waiting:
            codes, scale = waiting.pop(weight), waiting.pop(weight + SCALE)
            bits, group_size = config.quantization_bit, config.quantization_group_size
            parts = _added(widened_parts(codes, scale, bits, group_size), delta(part))
            yield from shrunk_parts(weight, parts, bits, group_size)

    return transform


def delta(part: LowRank) -> Tensor:
    """The product scaling · up · down, fp32 [out, in]."""
    return read_tensor(part.up).float() @ read_tensor(part.down).float() * part.scaling


def _added(rows: Iterator[Tensor], added: Tensor) -> Iterator[Tensor]:
    start = 0
    for some in rows:
        yield some + added[start : start + len(some)]
        start += len(some)
