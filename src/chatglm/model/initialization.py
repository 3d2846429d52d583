"""Weights to start training from; the original released none.

ChatGLM's blocks are DeepNorm blocks, so the branches that add to the residual start smaller: Xavier normal, with gain
(2·layers)^-1/2 for the value projection, both feed-forward matrices and the attention's output (DeepNet §2.2;
GLM-130B §2.1). Pre-LN models follow GLM (ACL 2022): normal(0, 0.02), output matrices divided by √(2·layers). Biases
0, norms 1 and 0.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .block import Block
from .glm import GLM

EMBEDDING_STD = 0.02


@torch.no_grad()
def initialize(model: GLM, seed: int) -> None:
    """Draw every parameter of `model` in place, reproducibly from `seed`."""
    config = model.config
    generator = torch.Generator(model.device).manual_seed(seed)
    is_deepnorm = config.norm_order == "post_scaled"
    small = (2 * config.num_layers) ** -0.5

    def draw(weight: torch.Tensor, gain: float) -> None:
        fan_out, fan_in = weight.shape
        std = gain * math.sqrt(2 / (fan_in + fan_out)) if is_deepnorm else gain * EMBEDDING_STD
        weight.normal_(0, std, generator=generator)

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
            module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, EMBEDDING_STD, generator=generator)
        elif isinstance(module, nn.Linear) and module is not model.lm_head:
            draw(module.weight, 1.0)
            if module.bias is not None:
                module.bias.zero_()
    if not config.tied_head:
        model.lm_head.weight.normal_(0, EMBEDDING_STD, generator=generator)
    for layer in model.transformer.layers:
        assert isinstance(layer, Block)
        draw(layer.attention.dense.weight, small)
        draw(layer.mlp.dense_4h_to_h.weight, small)
        if is_deepnorm:
            draw(layer.mlp.dense_h_to_4h.weight, small)
            weight = layer.attention.query_key_value.weight
            layout = (config.num_heads, 3, -1) if config.qkv_layout == "per_head" else (1, 3, -1)
            weight.unflatten(0, layout)[:, 2].mul_(small)  # the value rows
