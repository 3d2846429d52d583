"""Small policies with a tokenizer of their own, for tests of what learns from preferences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chatglm.config import ModelConfig
from chatglm.model import GLM, initialize
from chatglm.tokenizer import Tokenizer
from chatglm.tokenizer.making import make_tokenizer_file
from chatglm.training.rlhf.rollout import Prompt, make_prompt

TEXTS = [
    f"What colour is the {thing}? The {thing} is {colour}. 这个东西是什么颜色的？它是{hue}色的。"
    for thing in ("sky", "sea", "grass", "snow", "coal", "sun")
    for colour, hue in (("blue", "蓝"), ("green", "绿"), ("white", "白"), ("black", "黑"))
]


def tiny_config(tokenizer: Tokenizer, **changes: object) -> ModelConfig:
    """Two layers of 32, with the special ids of the tokenizer."""
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "inner_hidden_size": 64,
        "max_sequence_length": 64,
        "residual_scale": 2.0,
        "bos_token_id": tokenizer.sop_id,
        "eos_token_id": tokenizer.eop_id,
        "mask_token_id": tokenizer.mask_id,
        "gmask_token_id": tokenizer.gmask_id,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": "float32",
    }
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def tiny_policy(tokenizer: Tokenizer, seed: int = 0, spread: float = 8.0, **changes: object) -> GLM:
    """Random weights; the embedding is scaled up by `spread` so that the distributions are not flat."""
    model = GLM(tiny_config(tokenizer, **changes))
    initialize(model, seed)
    with torch.no_grad():
        model.transformer.word_embeddings.weight.mul_(spread)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tiny-tokenizer")
    return Tokenizer.from_file(make_tokenizer_file(TEXTS, folder, pieces=440))


def prompts_of(tokenizer: Tokenizer) -> list[Prompt]:
    """Questions of several lengths."""
    questions = [
        "What colour is the sky?",
        "海是什么颜色的？",
        "Snow?",
        "What colour is the grass, the coal and the sun?",
    ]
    return [make_prompt(tokenizer, question) for question in questions]
