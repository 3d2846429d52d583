"""Which part of each tensor a rank holds.

query_key_value and the first feed-forward matrix are split by output (by heads, by inner units), dense and the second
matrix by input, so that a layer needs two sums over the ranks and nothing else. Norms and the embedding are whole
everywhere; a bias behind a sum is held by rank 0 alone, so that it is added once. Source: Megatron-LM (Shoeybi et al.
2019) §3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import DeviceError
from ..model import GLM
from ..model.attention import Attention
from ..model.block import Block
from ..model.linear import Linear

Transform = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]


def check_divisible(config: ModelConfig, world_size: int) -> None:
    """Raises DeviceError, with both numbers, when heads or inner units do not divide evenly."""
    for what, count in (("heads", config.num_heads), ("inner units", config.inner_hidden_size // 2)):
        if count % world_size:
            raise DeviceError(f"{count} {what} cannot be split evenly over {world_size} devices")


def shard_model(model: GLM, rank: int, world_size: int) -> None:
    """Make the linears of `model` (on the meta device) as large as one rank's part. The head is not touched."""
    check_divisible(model.config, world_size)
    for layer in model.transformer.layers:
        assert isinstance(layer, Block)
        layer.attention.num_heads //= world_size
        _resize(layer.attention, "query_key_value", outputs=world_size)
        _resize(layer.mlp, "dense_h_to_4h", outputs=world_size)
        _resize(layer.attention, "dense", inputs=world_size)
        _resize(layer.mlp, "dense_4h_to_h", inputs=world_size)
    if model.config.pre_seq_len is not None:
        encoder = model.transformer.prefix_encoder
        encoder.num_heads //= world_size
        if isinstance(encoder.trans, nn.Sequential):
            last = encoder.trans[2]
            assert isinstance(last, nn.Linear)
            encoder.trans[2] = nn.Linear(last.in_features, last.out_features // world_size, device="meta")
        else:
            old = encoder.embedding
            encoder.embedding = type(old)(old.num_embeddings, old.embedding_dim // world_size, device="meta")


def _resize(parent: nn.Module, name: str, *, outputs: int = 1, inputs: int = 1) -> None:
    old = getattr(parent, name)
    assert isinstance(old, Linear)
    setattr(parent, name, Linear(old.in_features // inputs, old.out_features // outputs, device="meta"))


def sharded(config: ModelConfig, rank: int, world_size: int, then: Transform | None = None) -> Transform:
    """A `transform` for checkpoint.load_into that keeps one rank's part of each tensor.

    then  a transform that runs first, on whole tensors (quantising on load), so that scales are those of one device
    """

    def transform(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        for made_name, made in then(name, tensor) if then else ((name, tensor),):
            yield made_name, part_of(made_name, made, config, rank, world_size)

    return transform


def part_of(name: str, tensor: Tensor, config: ModelConfig, rank: int, world_size: int) -> Tensor:
    """The part of the tensor `name` that `rank` holds; the tensor itself where it is whole on every rank."""

    def chunk(part: Tensor, dim: int) -> Tensor:
        return part.chunk(world_size, dim=dim)[rank]

    module, _, leaf = name.rpartition(".")
    if module.endswith("query_key_value"):
        if config.qkv_layout == "per_head":
            return chunk(tensor, 0)
        return chunk(tensor.unflatten(0, (3, -1)), 1).flatten(0, 1)
    if module.endswith("dense_h_to_4h"):
        halves = 2 if config.mlp == "geglu" else 1
        return chunk(tensor.unflatten(0, (halves, -1)), 1).flatten(0, 1)
    if module.endswith(("attention.dense", "dense_4h_to_h")):
        if leaf == "bias":
            return tensor if rank == 0 else torch.zeros_like(tensor)
        return chunk(tensor, 1) if tensor.ndim == 2 else tensor  # a scale of a whole row is every rank's
    if "prefix_encoder" in module and _is_prefix_output(module, config):
        axis = 0 if name.endswith("trans.2.weight") else tensor.ndim - 1  # the axis of layers, heads, head_dim
        split = tensor.unflatten(axis, (2 * config.num_layers, config.num_heads, config.head_dim))
        return chunk(split, axis + 1).flatten(axis, axis + 2)
    return tensor


def _is_prefix_output(module: str, config: ModelConfig) -> bool:
    """Whether this prefix tensor has the axis of layers and heads."""
    return module.endswith("trans.2" if config.prefix_projection else "embedding")


def local_heads(model: GLM) -> int:
    """Attention heads that this rank computes."""
    first = model.transformer.layers[0]
    assert isinstance(first, Block) and isinstance(first.attention, Attention)
    return first.attention.num_heads
