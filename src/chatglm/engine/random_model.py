"""Models with random weights, made directly in the form that they run in: for benchmarks and memory tests.

Nothing is read or expanded: quantised weights are random codes from the start, so building ChatGLM-6B in INT4 needs
the memory of the INT4 model and no more. Weights spread as a trained model's do, so activations stay finite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checkpoint.huge_pages import prefer_huge_pages
from ..config import ModelConfig
from ..model import GLM
from ..parallel import ProcessGroup, connect, shard_model
from ..quantization import QuantizedEmbedding, QuantizedLinear, swap_linears

WEIGHT_STD = 0.02

CODE_STD = {4: 4.61, 8: 73.9}
"""Standard deviation of codes that are spread evenly."""

BOUNDS = {torch.int32: (-(2**31), 2**31 - 1), torch.int8: (-128, 128), torch.uint8: (0, 256)}

CHUNK_ELEMENTS = 1 << 26
"""Numbers drawn at once on a CPU, to bound what the generator needs beside the result."""


def random_model(
    config: ModelConfig,
    *,
    bits: int = 0,
    group_size: int = 0,
    embedding_bits: int | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> GLM:
    """A GLM of this shape.

    bits            of the linears: 0 for weights in `dtype`, else 8 or 4
    group_size      columns that share a scale; 0 is the original's row-wise format
    embedding_bits  of embedding and head; None: as the linears
    group           make one rank's part: every rank draws the same numbers, so what is whole everywhere is equal
    """
    device = torch.device(device)
    with torch.device("meta"):
        model = GLM(config)
    if group:
        shard_model(model, group.rank, group.world_size)
    embedding_bits = bits if embedding_bits is None else embedding_bits
    swap_linears(
        model, bits, embeddings=embedding_bits > 0, group_size=group_size, embedding_bits=embedding_bits or bits
    )
    model.to(dtype)
    model.to_empty(device=device)
    model.tie_head()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            _fill(module, generator)
    if group:
        connect(model, group)
    model.requires_grad_(False)
    return model.eval()


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    if isinstance(module, nn.LayerNorm):
        module.weight.fill_(1)
        module.bias.zero_()
        return
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        if isinstance(module, QuantizedLinear) and module.is_tied:
            return
        prefer_huge_pages(module.weight)
        words = module.weight.view(torch.int32) if module.weight.shape[1] % 4 == 0 else module.weight
        _draw(words, lambda part: part.random_(*BOUNDS[part.dtype], generator=generator))
        module.weight_scale.fill_(WEIGHT_STD / CODE_STD[module.bits])
    elif isinstance(module, nn.Linear | nn.Embedding):
        _draw(module.weight, lambda part: part.normal_(0, WEIGHT_STD, generator=generator))
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.normal_(0, WEIGHT_STD, generator=generator)


def _draw(tensor: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), CHUNK_ELEMENTS):
        draw(flat[start : start + CHUNK_ELEMENTS])
