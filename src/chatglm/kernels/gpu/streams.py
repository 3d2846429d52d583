"""Stream order: how the input of a quantised linear lies in memory.

A word of 32 bits holds the codes of `streams` neighbouring columns (8 for INT4, 4 for INT8). A kernel that unpacks one
place of many words at once needs the matching columns side by side: all columns whose number leaves the same rest by
`streams`. So a vector in stream order is [columns / streams, streams] transposed. One stream is the usual order.
"""

from __future__ import annotations

from torch import Tensor


def to_streams(vectors: Tensor, streams: int) -> Tensor:
    """[..., columns] in the usual order → the same in stream order."""
    ordered: Tensor = vectors.unflatten(-1, (-1, streams)).transpose(-1, -2).flatten(-2)
    return ordered


def from_streams(vectors: Tensor, streams: int) -> Tensor:
    """The inverse of to_streams."""
    ordered: Tensor = vectors.unflatten(-1, (streams, -1)).transpose(-1, -2).flatten(-2)
    return ordered
