"""The forecast of adapter runs against what the arithmetic of the sizes says and what a forward pass really keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.config import ModelConfig
from chatglm.model import GLM, initialize, sdpa_attention
from chatglm.training.adapters.costs import frozen_bytes, layer_elements, trained_parameters, widest_expanded
from chatglm.training.adapters.lora import add_lora
from chatglm.training.adapters.prefix import add_prefix, prefixed
from chatglm.training.adapters.settings import LoraSettings, PtuningSettings, QloraSettings
from chatglm.training.forecast import forecast
from chatglm.training.run_config import RunConfig
from chatglm.training.settings import build

pytest.importorskip("peft")

HIDDEN, TOKENS = 128, 32
ALL_FOUR = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def kept_by_a_layer(settings: LoraSettings | PtuningSettings, dtype: torch.dtype) -> float:
    """Bytes that one more layer saves for the backward pass, by token and hidden unit."""

    def kept(layers: int) -> int:
        config = ModelConfig(
            vocab_size=128, hidden_size=HIDDEN, num_layers=layers, num_heads=2, inner_hidden_size=4 * HIDDEN,
            bos_token_id=120, eos_token_id=121, mask_token_id=122, gmask_token_id=123,
        )  # fmt: skip
        model = GLM(config)
        initialize(model, 0)
        model.requires_grad_(False).to(dtype)
        if isinstance(settings, LoraSettings):
            add_lora(model, settings, 0)
        else:
            add_prefix(model, prefixed(config, settings), settings, 0)
        own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        held: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        place = torch.arange(TOKENS)[None]
        blocked = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)[None, None]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.train().transformer(
                place % 100, torch.stack((place, place * 0), 1), blocked, attend=sdpa_attention
            )
        assert output.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    return (kept(3) - kept(2)) / (TOKENS * HIDDEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [LoraSettings(dropout=0.0), LoraSettings(dropout=0.0, targets=ALL_FOUR), PtuningSettings(pre_seq_len=4)],
    ids=["lora", "lora-on-all", "ptuning"],
)
def test_a_layer_keeps_what_the_forecast_says_within_a_tenth(
    settings: LoraSettings | PtuningSettings, dtype: torch.dtype
) -> None:
    said = layer_elements(ModelConfig(), settings, dtype.itemsize) * dtype.itemsize
    assert said == pytest.approx(kept_by_a_layer(settings, dtype), rel=0.1)


def six_billion(tmp_path: Path, method: dict[str, Any], length: int, **sections: Any) -> RunConfig:
    values = {
        "out": tmp_path,
        "steps": 10,
        "method": method,
        "batch": {"rows": 1, "length": length},
        "compute": {"checkpointing": True, "precision": "bf16"},
    }
    return build(RunConfig, {**values, **sections}, "test")


def gib(size: int) -> float:
    return size / 2**30


def test_frozen_weights_are_those_of_the_arithmetic() -> None:
    full = ModelConfig()
    assert frozen_bytes(full, 2) == 2 * full.num_parameters == 12_346_572_800
    int4 = full.quantized(4, 0, 0)
    body = 28 * (4 + 8) * 4096 * 4096 // 2
    assert frozen_bytes(int4, 2) == pytest.approx(body + 130_528 * 4096 * 2, rel=0.01)
    assert widest_expanded(full, 2) == 0
    assert widest_expanded(int4, 2) == 16_384 * 4096 * 2


@pytest.mark.parametrize(
    ("method", "settings", "length", "most"),
    [
        ({"name": "qlora"}, QloraSettings(), 2048, 8.0),
        ({"name": "ptuning", "bits": 4}, PtuningSettings(bits=4), 2048, 8.0),
        ({"name": "ptuning", "bits": 4}, PtuningSettings(bits=4), 128, 6.7),
    ],
)
def test_the_six_billion_shape_fits_the_memory_that_is_promised(
    method: dict[str, Any], settings: LoraSettings | PtuningSettings, length: int, most: float, tmp_path: Path
) -> None:
    config = ModelConfig().quantized(4, None, 0)
    told = forecast(
        six_billion(tmp_path, method, length),
        config,
        trained=trained_parameters(config, settings),
        frozen_bytes=frozen_bytes(config, 2) + widest_expanded(config, 2),
        processes=1,
    )
    assert told.trained in (3_670_016, 29_360_128)
    assert 3.6 < gib(told.memory) < most * 1e9 / 2**30
