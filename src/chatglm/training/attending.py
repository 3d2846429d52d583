"""Which attention kernel a packed batch is trained with: FlexAttention on a GPU, PyTorch's fused one elsewhere.

FlexAttention is compiled by Triton; where that cannot build, a GPU too runs the fused kernel with a written-out mask.
"""

from __future__ import annotations

import torch

from ..config import ModelConfig
from ..kernels.probe import why_not_triton
from ..model import Attend, sdpa_attention
from .masks import flex_attend, flex_block_mask
from .samples import Batch

FLEX_HEADS = (16, 32, 64, 128, 256)
"""Head sizes that FlexAttention has kernels for."""


def attend_for(batch: Batch, config: ModelConfig) -> Attend:
    """The kernel for a batch where it lies; one that does not bring its own mask is given the dense one."""
    if has_flex(batch.ids.device, config):
        return flex_attend(flex_block_mask(batch, prefix=config.pre_seq_len or 0))
    return sdpa_attention


def has_flex(device: torch.device, config: ModelConfig) -> bool:
    """Whether batches on this device are trained with FlexAttention."""
    return config.head_dim in FLEX_HEADS and why_not_triton(device) is None
