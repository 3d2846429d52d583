"""Adapter folders of random values, written without the package: a LoRA as PEFT has it, a prefix as the original."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from chatglm.config import ModelConfig, to_original

RANK, ALPHA = 4, 8


def low_rank_folder(
    folder: Path, config: ModelConfig, seed: int = 0, size: float = 0.1, base: str = "embedded"
) -> Path:
    """Products beside all four linears of every layer, rank 4, alpha 8."""
    hidden, inner = config.hidden_size, config.inner_hidden_size
    shapes = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
    }
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config.num_layers):
        for name, (out, columns) in shapes.items():
            where = f"base_model.model.transformer.layers.{layer}.{name}"
            tensors[f"{where}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw) * columns**-0.5
            tensors[f"{where}.lora_B.weight"] = torch.randn(out, RANK, generator=draw) * size
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        "base_model_name_or_path": base,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    return folder


def prefix_folder(
    folder: Path, config: ModelConfig, length: int = 4, seed: int = 0, size: float = 1.0, base: str = "embedded"
) -> Path:
    """A prefix without projection, and the config.json of the base beside it."""
    draw = torch.Generator().manual_seed(seed)
    width = 2 * config.num_layers * config.hidden_size
    folder.mkdir()
    table = torch.randn(length, width, generator=draw) * size
    save_file({"transformer.prefix_encoder.embedding.weight": table}, folder / "model.safetensors")
    facts = {**to_original(config), "_name_or_path": base, "pre_seq_len": length, "prefix_projection": False}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder
