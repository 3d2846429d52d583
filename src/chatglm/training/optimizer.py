"""AdamW over two kinds of parameters, gradient norms by part of the network, clipping; plain and sharded tensors.

Biases and norms are not decayed (as in GLM's code). Norms are reported for the embedding, the first layer and the rest
apart: a spike in the embedding's gradient comes a few steps before a collapse (GLM-130B §3.3).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .run_config import OptimizerSettings

PARTS = ("embedding", "layer_0", "others")
"""Parts of the network whose gradient norms are reported apart."""


def part_of(name: str) -> str:
    """Which of PARTS a parameter belongs to."""
    if "word_embeddings." in name:
        return "embedding"
    return "layer_0" if ".layers.0." in f".{name}" else "others"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name, each once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW on everything that learns. Plain and sharded tensors lie in groups of their own: no kernel takes both."""
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = defaultdict(list)
    for parameter in trained(model).values():
        layout = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups[parameter.ndim >= 2, layout].append(parameter)
    decay = settings.weight_decay
    is_cuda = all(parameter.is_cuda for found in groups.values() for parameter in found)
    return torch.optim.AdamW(
        [{"params": found, "weight_decay": decay if is_matrix else 0.0} for (is_matrix, _), found in groups.items()],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=is_cuda,  # the other kernels make temporary copies as large as the weights
    )


@dataclass(frozen=True)
class GradientNorms:
    """Euclidean norms of the gradient: of everything, and of each part."""

    total: float
    parts: dict[str, float]


@torch.no_grad()
def gradient_norms(parameters: dict[str, nn.Parameter], factor: float = 1.0) -> GradientNorms:
    """Norms of gradient · factor over all processes; the same numbers on every one."""
    sums: dict[Any, Tensor] = {}
    for name, parameter in parameters.items():
        gradient = parameter.grad
        if gradient is None:
            continue
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        place = sums.setdefault(_shards(gradient), torch.zeros(len(PARTS), dtype=torch.float64, device=local.device))
        norm = torch.linalg.vector_norm(local, dtype=torch.float32)
        place[PARTS.index(part_of(name))] += norm.double().square()
    squares = torch.zeros(len(PARTS), dtype=torch.float64)
    for (mesh, axes), part in sums.items():
        for axis in axes:
            torch.distributed.all_reduce(part, group=mesh.get_group(axis))
        squares += part.cpu()
    found = (squares.sqrt() * factor).tolist()
    return GradientNorms(float(squares.sum().sqrt()) * factor, dict(zip(PARTS, found, strict=True)))


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient in place."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            groups[local.device, local.dtype].append(local)
    for tensors in groups.values():
        torch._foreach_mul_(tensors, factor)


def _shards(gradient: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The mesh of a gradient, and the axes of the mesh over which it lies in parts."""
    if not isinstance(gradient, DTensor):
        return None, ()
    placements = gradient.placements  # rows in strides, as of FSDP over tensor parallel, are no `Shard`
    return gradient.device_mesh, tuple(i for i, place in enumerate(placements) if not place.is_replicate())
