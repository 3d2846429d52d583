"""A model to its quantised form and back, module by module, so that never more than one weight exists twice.

`model` is a GLM, or any module with the same parts: `transformer` (a model.Network) and `lm_head`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ..config import ModelConfig
from ..errors import QuantizationError
from ..model.linear import Embedding, Linear
from .modules import (
    GroupQuantizedEmbedding,
    GroupQuantizedLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    RowQuantizedEmbedding,
    RowQuantizedLinear,
)
from .row_format import check_bits

LINEARS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
"""The four linears of each layer; norms, biases and the prefix encoder stay as they are."""


Model = TypeVar("Model", bound=nn.Module)


def swap_linears(
    model: Model, bits: int, embeddings: bool = False, *, group_size: int = 0, embedding_bits: int = 0
) -> Model:
    """Turn the linears of `model` into quantised ones, in place; returns the model.

    bits            8 or 4; 0 leaves the model as it is
    group_size      columns that share a scale (the project's own format); 0 is the original's row-wise format
    embeddings      also the embedding and the head (the `-qe` form), which share codes and scales if the head is tied
    embedding_bits  of embedding and head, where they differ from the linears; 0: as the linears
    A model on the meta device gets empty modules to load a quantised checkpoint into; a real one has its weights
    quantised. The model's ModelConfig follows. Raises QuantizationError for a model that is quantised already, and
    for a weight that cannot be (the message names it); then some modules may be swapped.
    """
    if bits == 0:
        return model
    check_bits(bits)
    table_bits = embedding_bits or bits
    check_bits(table_bits)
    config = _config(model)
    linears = _layer_linears(model)
    if any(isinstance(linear, QuantizedLinear) for _, linear in linears):
        raise QuantizationError(f"the model is already quantised to INT{config.quantization_bit}")
    for name, linear in linears:
        with named(name):
            model.set_submodule(name, _quantized_linear(linear, bits, group_size))
    _finish(model, config.quantized(bits, group_size, table_bits if embeddings else 0))
    return model


def swap_tables_as_described(model: Model, config: ModelConfig) -> Model:
    """What is left to do where the linears of `model` are quantised already: embedding and head; returns the model."""
    _finish(model, config)
    return model


def _finish(model: nn.Module, config: ModelConfig) -> None:
    """Embedding and head to the format of `config`, and the description."""
    bits, group_size = config.embedding_bits, config.quantization_group_size
    if bits:
        with named("transformer.word_embeddings"):
            table = _quantized_embedding(model.get_submodule("transformer.word_embeddings"), bits, group_size)
        model.set_submodule("transformer.word_embeddings", table)
        with named("lm_head"):
            model.set_submodule("lm_head", _quantized_head(model, table, bits, group_size))
    _describe(model, config)


def swap_as_described(model: Model, config: ModelConfig) -> Model:
    """swap_linears with the format of `config`, which may be a plain one; returns the model."""
    return swap_linears(
        model,
        config.quantization_bit,
        config.quantization_embeddings,
        group_size=config.quantization_group_size,
        embedding_bits=config.embedding_bits,
    )


def dequantize_model(model: Model, dtype: torch.dtype) -> Model:
    """The inverse: plain linears in `dtype`, in place; returns the model. A plain model is only cast.

    The weights are scale · code, rounded once to `dtype`; what quantising lost stays lost.
    """
    config = _config(model)
    for name, linear in _layer_linears(model):
        if isinstance(linear, QuantizedLinear):
            model.set_submodule(name, _plain_linear(linear, dtype))
    table, head = model.get_submodule("transformer.word_embeddings"), model.get_submodule("lm_head")
    if isinstance(table, QuantizedEmbedding):
        plain = Embedding(table.num_embeddings, table.embedding_dim, device="meta")
        plain.weight = nn.Parameter(table.dequantize(dtype), requires_grad=False)
        model.set_submodule("transformer.word_embeddings", plain)
        if config.tied_head:
            tied = Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
            tied.weight = plain.weight
            model.set_submodule("lm_head", tied)
        elif isinstance(head, QuantizedLinear):
            model.set_submodule("lm_head", _plain_linear(head, dtype))
    model.to(dtype)
    _describe(model, config.quantized(0))
    return model


@contextmanager
def named(name: str) -> Iterator[None]:
    """A QuantizationError inside gets the name of the weight in front."""
    try:
        yield
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error.message}", cure=error.cure) from error


def _config(model: nn.Module) -> ModelConfig:
    transformer: Any = model.get_submodule("transformer")
    config: ModelConfig = transformer.description
    return config


def _describe(model: nn.Module, config: ModelConfig) -> None:
    transformer: Any = model.get_submodule("transformer")
    transformer.description = config
    for owner in (model, transformer):
        if isinstance(getattr(owner, "config", None), ModelConfig):
            owner.config = config


def _layer_linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    layers = range(_config(model).num_layers)
    names = [f"transformer.layers.{layer}.{path}" for layer in layers for path in LINEARS]
    return [(name, model.get_submodule(name)) for name in names]


def _new_linear(in_features: int, out_features: int, bits: int, group_size: int) -> QuantizedLinear:
    """An empty one without bias, on the current default device."""
    if group_size:
        return GroupQuantizedLinear(in_features, out_features, bits, group_size, bias=False)
    return RowQuantizedLinear(in_features, out_features, bits, bias=False)


def _quantized_linear(linear: nn.Module, bits: int, group_size: int) -> QuantizedLinear:
    assert isinstance(linear, nn.Linear)
    with torch.device(linear.weight.device):
        quantized = _new_linear(linear.in_features, linear.out_features, bits, group_size)
    if not linear.weight.is_meta:
        quantized.quantize_(linear.weight.detach())
    if linear.bias is not None:
        quantized.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return quantized


def _quantized_embedding(table: nn.Module, bits: int, group_size: int) -> QuantizedEmbedding:
    assert isinstance(table, nn.Embedding)
    rows, columns = table.num_embeddings, table.embedding_dim
    quantized: QuantizedEmbedding
    with torch.device(table.weight.device):
        if group_size:
            quantized = GroupQuantizedEmbedding(rows, columns, bits, group_size)
        else:
            quantized = RowQuantizedEmbedding(rows, columns, bits)
    quantized.dtype_like = quantized.dtype_like.to(table.weight.dtype)
    if not table.weight.is_meta:
        quantized.quantize_(table.weight.detach())
    return quantized


def _quantized_head(model: nn.Module, embedding: QuantizedEmbedding, bits: int, group_size: int) -> QuantizedLinear:
    """The head as a quantised linear: that of the embedding, or with its own weights."""
    config = _config(model)
    if not config.tied_head:
        return _quantized_linear(model.get_submodule("lm_head"), bits, group_size)
    with torch.device("meta"):
        head = _new_linear(config.hidden_size, config.vocab_size, bits, group_size)
    head.tie(embedding)
    return head


def _plain_linear(linear: QuantizedLinear, dtype: torch.dtype) -> Linear:
    plain = Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(linear.dequantize(dtype), requires_grad=False)
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    return plain
