"""Weights to start training from; the original released none.

ChatGLM's blocks are DeepNorm blocks, so the branches that add to the residual start smaller: Xavier normal, with gain
(2·layers)^-1/2 for the value projection, both feed-forward matrices and the attention's output (DeepNet §2.2;
GLM-130B §2.1). Pre-LN models follow GLM (ACL 2022): normal(0, 0.02), output matrices divided by √(2·layers). Biases
0, norms 1 and 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .block import Block
from .glm import GLM
from .linear import Linear

EMBEDDING_STD = 0.02


@torch.no_grad()
def initialize(model: GLM, seed: int) -> None:
    """Draw every parameter of `model` in place, reproducibly from `seed`."""
    places = dict(model.named_parameters())
    for name, value in initial_values(model, seed, model.device):
        places[name].copy_(value)


@torch.no_grad()
def initial_values(model: GLM, seed: int, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """What `initialize` draws, by name, one parameter at a time; the model gives names and shapes and may be empty."""
    config = model.config
    generator = torch.Generator(device).manual_seed(seed)
    is_deepnorm = config.norm_order == "post_scaled"
    small = (2 * config.num_layers) ** -0.5
    smaller = {id(linear) for layer in model.transformer.layers for linear in _drawn_small(layer, is_deepnorm)}

    def like(weight: Tensor) -> Tensor:
        return torch.empty(weight.shape, dtype=weight.dtype, device=device)

    def draw(weight: Tensor, gain: float) -> Tensor:
        fan_out, fan_in = weight.shape
        std = gain * math.sqrt(2 / (fan_in + fan_out)) if is_deepnorm else gain * EMBEDDING_STD
        return like(weight).normal_(0, std, generator=generator)

    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            yield f"{name}.weight", like(module.weight).fill_(1)
            yield f"{name}.bias", like(module.bias).zero_()
        elif isinstance(module, nn.Embedding):
            yield f"{name}.weight", like(module.weight).normal_(0, EMBEDDING_STD, generator=generator)
        elif isinstance(module, nn.Linear) and module is not model.lm_head:
            value = draw(module.weight, 1.0)
            if is_deepnorm and name.endswith("query_key_value"):
                layout = (config.num_heads, 3, -1) if config.qkv_layout == "per_head" else (1, 3, -1)
                value.unflatten(0, layout)[:, 2].mul_(small)  # the value rows
            if id(module) not in smaller:
                yield f"{name}.weight", value
            if module.bias is not None:
                yield f"{name}.bias", like(module.bias).zero_()
    if not config.tied_head:
        yield "lm_head.weight", like(model.lm_head.weight).normal_(0, EMBEDDING_STD, generator=generator)
    names = {id(module): name for name, module in model.named_modules()}
    for layer in model.transformer.layers:
        for linear in _drawn_small(layer, is_deepnorm):
            yield f"{names[id(linear)]}.weight", draw(linear.weight, small)


def _drawn_small(layer: nn.Module, is_deepnorm: bool) -> list[Linear]:
    """The linears of a layer whose outputs are added to the residual stream, and with DeepNorm all of the MLP's."""
    assert isinstance(layer, Block)
    residual: list[Linear] = [layer.attention.dense, layer.mlp.dense_4h_to_h]
    return [*residual, layer.mlp.dense_h_to_4h] if is_deepnorm else residual
