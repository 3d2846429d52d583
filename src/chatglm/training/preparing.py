"""A model made ready for the loop: precision, embedding shrink, activation checkpointing, compiling.

Weights, gradients and optimiser state stay fp32. What runs in bf16 or fp16 are the activations: the embedding's output
is cast, and every linear and norm of the model follows the dtype of its input (model/linear.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import TrainingError
from .run_config import ComputeSettings
from .sharding import glms

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(compute: ComputeSettings, device: torch.device) -> str:
    """fp32, bf16 or fp16."""
    if compute.precision != "auto":
        return compute.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


class InputEmbedding:
    """A hook on the input embedding: e → α·e + (1-α)·stop(e) in the dtype of the run.

    The tied head is not touched: its gradient arrives whole. `alpha` is set before every step.
    Source: CogView (2021) §2.4; GLM-130B §3.3.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.alpha = 1.0
        self.handles: list[RemovableHandle] = []

    def remove(self) -> None:
        """Take the hook off again: the model is the caller's."""
        for handle in self.handles:
            handle.remove()

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.alpha != 1.0 and output.requires_grad:
            output = self.alpha * output + (1 - self.alpha) * output.detach()
        return output.to(self.dtype)


def prepare(model: nn.Module, compute: ComputeSettings, device: torch.device) -> InputEmbedding:
    """Put the hooks of a run into every GLM of a model (whose parameters are on their device and in fp32)."""
    hook = InputEmbedding(DTYPES[precision_of(compute, device)])
    for glm in glms(model):
        hook.handles.append(glm.transformer.word_embeddings.register_forward_hook(hook))
        glm.transformer.gradient_checkpointing = compute.checkpointing
        if compute.compile:
            _compile(glm, compute.compile_backend)
    return hook


def _compile(glm: nn.Module, backend: str) -> None:
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise TrainingError(f"`compute.compile_backend` is {backend!r}; known: {', '.join(known)}")
    for layer in glm.transformer.layers:  # type: ignore[union-attr]
        layer.compile(backend=backend)
