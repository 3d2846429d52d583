"""The network: plain PyTorch, no I/O, no tokenizer, no kernels.

Read in this order: positions, rotary, attention, block, prefix, glm.
"""

from .attention import Attend, Cache, plain_attention, sdpa_attention
from .glm import GLM, Transformer
from .initialization import initialize

__all__ = ["GLM", "Attend", "Cache", "Transformer", "initialize", "plain_attention", "sdpa_attention"]
