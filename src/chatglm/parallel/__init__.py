"""Tensor parallel: one model over several devices, applied from outside.

Read in this order: sharding (which part of a tensor a rank holds), connecting (what ranks exchange), group (processes).
"""

from .connecting import connect
from .group import ProcessGroup, join_group
from .sharding import Transform, check_divisible, shard_model, sharded

__all__ = ["ProcessGroup", "Transform", "check_divisible", "connect", "join_group", "shard_model", "sharded"]
