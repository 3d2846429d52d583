"""Which attention kernel a packed batch is trained with: FlexAttention on a GPU, PyTorch's fused one elsewhere."""

from __future__ import annotations

from ..config import ModelConfig
from ..model import Attend, sdpa_attention
from .masks import flex_attend, flex_block_mask
from .samples import Batch

FLEX_HEADS = (16, 32, 64, 128, 256)
"""Head sizes that FlexAttention has kernels for."""


def attend_for(batch: Batch, config: ModelConfig) -> Attend:
    """The kernel for a batch where it lies; one that does not bring its own mask is given the dense one."""
    if batch.ids.is_cuda and config.head_dim in FLEX_HEADS:
        return flex_attend(flex_block_mask(batch, prefix=config.pre_seq_len or 0))
    return sdpa_attention
