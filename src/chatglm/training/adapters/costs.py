"""What an adapter run holds, by arithmetic: for the forecast, before any weight is read."""

from __future__ import annotations

from ...checkpoint.layout import HEAD, PREFIX, expected_tensors, linear_shapes
from ...checkpoint.tensor_file import ITEM_BYTES
from ...config import ModelConfig
from ..run_config import RunConfig
from .base import base_dtype, wanted_config
from .prefix import prefixed
from .settings import LoraSettings, PtuningSettings, settings_of

FROZEN_ELEMENTS = 6
"""Of a layer that does not learn, beside the input of its GELU."""


def trained_parameters(config: ModelConfig, settings: LoraSettings | PtuningSettings) -> int:
    """Parameters that learn: 3,670,016 for ChatGLM-6B with the default LoRA, 29,360,128 with the default prefix."""
    if isinstance(settings, PtuningSettings):
        specs = expected_tensors(prefixed(config, settings))
        return sum(spec.elements for name, spec in specs.items() if name.startswith(PREFIX))
    shapes = [shape for name, shape in linear_shapes(config).items() if name.rsplit(".", 1)[-1] in settings.targets]
    return config.num_layers * sum(settings.r * (out + columns) for out, columns in shapes)


def frozen_bytes(config: ModelConfig, item: int) -> int:
    """Of a base in its weight format. item: bytes of what is stored as floats."""
    total = 0
    for name, spec in expected_tensors(config).items():
        if name.startswith((PREFIX, HEAD.removesuffix("weight")) if config.tied_head else (PREFIX,)):
            continue
        scale = name.endswith("_scale")
        total += spec.elements * (1 if spec.is_codes else 2 if scale else item)
    return total


def widest_expanded(config: ModelConfig, item: int) -> int:
    """Bytes of the largest weight that a quantised base expands at once (never two)."""
    if not config.quantization_bit:
        return 0
    layer = max(out * columns for out, columns in linear_shapes(config).values())
    table = config.vocab_size * config.hidden_size if config.embedding_bits else 0
    return max(layer, table) * item


def layer_elements(config: ModelConfig, settings: LoraSettings | PtuningSettings, item: int) -> float:
    """Numbers of `item` bytes that a layer keeps for the backward pass, for each token and hidden unit.

    A frozen linear keeps no input. A LoRA keeps its own, in fp32 (and which of it dropout let through), and beside
    `query_key_value` the whole output, of which values are a part.
    """
    inner = config.inner_hidden_size / config.hidden_size
    kept = FROZEN_ELEMENTS + inner
    if isinstance(settings, LoraSettings):
        widths = {"query_key_value": 1.0, "dense": 1.0, "dense_h_to_4h": 1.0, "dense_4h_to_h": inner}
        mask = 1 if settings.dropout else 0
        kept += sum(widths[target] for target in settings.targets) * (4 + mask) / item
        kept += 2 if "query_key_value" in settings.targets else 0
    return kept


def costs(run: RunConfig) -> tuple[int, int] | None:
    """(parameters that learn, bytes of what does not) of an adapter run; None for a method that trains everything."""
    settings = settings_of(run.method)
    if settings is None:
        return None
    wanted = wanted_config(run, settings)
    item = ITEM_BYTES[str(base_dtype(run.compute)).removeprefix("torch.")]
    return trained_parameters(wanted, settings), frozen_bytes(wanted, item) + widest_expanded(wanted, item)
