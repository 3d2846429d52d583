"""A second model with the same weights: the reference beside a policy, a value model, the engine's own copy."""

from __future__ import annotations

import torch

from ...model import GLM


def copy_of(model: GLM) -> GLM:
    """A language model with the same weights in memory of its own."""
    with torch.device("meta"):
        made = GLM(model.config)
    made.to_empty(device=model.device)
    made.tie_head()
    for mine, theirs in zip(made.parameters(), model.parameters(), strict=True):
        mine.data = theirs.detach().clone()  # keeps the dtype too
    made.tie_head()
    return made.train(model.training)
