"""A checkpoint of random weights in the exact shard layout of the original release, for tests at full size.

Values are drawn so that every layer matters and nothing overflows fp16: attention scores, branches and logits are of
order one. Each tensor has its own generator, seeded by the seed and its name, so the tied head is the embedding drawn
again.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig, to_original
from .atomic import whole_folder
from .folder import CONFIG, TOKENIZER_CONFIG
from .layout import EMBEDDING, HEAD, ROTARY, TensorSpec, expected_tensors, original_names, original_shards, stored_bytes
from .saving import MAX_SHARD_BYTES, Layout, Shards, dump, save, tokenizer_files
from .tensor_file import Progress

GAINS = {"dense_4h_to_h": 3.0, "attention.dense": 2.0}
"""Standard deviation of the branches' last matrices times √columns: beside the √56-fold residual they must be heard."""

OTHER_GAIN = 1.5


def random_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    seed: int = 0,
    layout: Layout = "original",
    *,
    tokenizer_file: str | Path | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a random checkpoint of `config`, at most one shard (2 GB) in memory; returns the folder.

    "original": torch zip shards cut as the release was (eight for ChatGLM-6B, spec/chatglm-6b.md §9), fp16 with fp32
    norms, rotary buffers, the tied head stored again, the stale `total_size`. "safetensors": fp16, no tied head.
    A quantised config gets random codes and scales. Raises CheckpointError when the disk is too small.
    """
    if layout == "safetensors":
        specs = {name: spec for name, spec in expected_tensors(config).items() if not spec.is_optional}
        drawn = ((name, draw(name, spec, config, seed, torch.float16)) for name, spec in specs.items())
        size = sum(stored_bytes(name, spec, norm_bytes=2) for name, spec in specs.items())
        return save(
            folder,
            drawn,
            config,
            tokenizer_file=tokenizer_file,
            max_shard_bytes=max_shard_bytes or MAX_SHARD_BYTES,
            overwrite=overwrite,
            total_bytes=size,
            progress=progress,
        )
    names = original_names(config)
    total = sum(stored_bytes(name, spec) for name, spec in names.items())
    shard_names, stale_size = original_shards(config, max_shard_bytes)
    small = {
        CONFIG: dump(to_original(config)),
        TOKENIZER_CONFIG: dump(tokenizer_config(config)),
        **tokenizer_files(tokenizer_file),
    }
    with whole_folder(Path(folder), total, overwrite=overwrite) as temporary:
        for name, data in small.items():
            (temporary / name).write_bytes(data)
        shards = Shards(temporary, "original", total)
        done = 0
        for held in shard_names:
            for name in held:
                dtype = torch.float32 if "layernorm" in name else torch.float16
                shards.add(name, draw(name, names[name], config, seed, dtype))
                done += stored_bytes(name, names[name])
                if progress is not None:
                    progress(done, total, "writing random weights")
            shards.flush()
        shards.finish(stale_size)
    return Path(folder)


def tokenizer_config(config: ModelConfig) -> dict[str, object]:
    """The original's tokenizer_config.json for the era of `config` (spec/chatglm-6b.md §2)."""
    found: dict[str, object] = {
        "bos_token": "<sop>",
        "eos_token": "<eop>",
        "end_token": "</s>",
        "gmask_token": "[gMASK]",
        "mask_token": "[MASK]",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "num_image_tokens": 0,
    }
    if config.era == "pre-slim":
        del found["end_token"], found["num_image_tokens"]
        found |= {"eos_token": "</s>", "eop_token": "<eop>"}
    return found


def draw(name: str, spec: TensorSpec, config: ModelConfig, seed: int, dtype: torch.dtype) -> Tensor:
    """The random tensor of this name; int8 or uint8 for codes, else in `dtype`."""
    if name.endswith(ROTARY):
        exponents = torch.arange(spec.shape[0]) / spec.shape[0]
        frequencies: Tensor = torch.tensor(config.rotary_base).pow(-exponents)
        return frequencies.to(dtype)
    source = name.replace(HEAD.removesuffix(".weight"), "transformer.word_embeddings") if config.tied_head else name
    digest = hashlib.sha256(f"{seed} {source}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bits = config.embedding_bits if source.startswith((EMBEDDING[:-7], HEAD[:-7])) else config.quantization_bit
    if spec.is_codes:
        return _codes(spec, bits, generator)
    if name.endswith("weight_scale"):
        limit = (1 << bits - 1) - 1
        scale = _deviation(name, config) * math.sqrt(3) / limit  # codes are uniform in ±limit
        return (scale * (0.5 + torch.rand(spec.shape, generator=generator))).to(dtype)
    tensor = torch.empty(spec.shape, dtype=dtype)
    if len(spec.shape) == 1:
        return tensor.normal_(1.0 if "layernorm.weight" in name else 0.0, 0.1, generator=generator)
    return tensor.normal_(0.0, _deviation(name, config), generator=generator)


def _deviation(name: str, config: ModelConfig) -> float:
    """Standard deviation of a matrix: the gain over the root of its columns."""
    if "prefix_encoder.embedding" in name:
        return 1.0
    columns = config.inner_hidden_size if "dense_4h_to_h" in name else config.hidden_size
    return next((gain for part, gain in GAINS.items() if part in name), OTHER_GAIN) / math.sqrt(columns)


def _codes(spec: TensorSpec, bits: int, generator: torch.Generator) -> Tensor:
    """Even over -127 … 127 or -7 … 7, packed as the spec's dtype says."""
    if bits == 8:
        return torch.randint(-127, 128, spec.shape, dtype=torch.int8, generator=generator)
    high, low = (torch.randint(-7, 8, spec.shape, dtype=torch.int8, generator=generator) for _ in range(2))
    if spec.kinds == ("uint8",):  # the own format: the even column low, each code + 8
        return (low + 8).to(torch.uint8) | ((high + 8).to(torch.uint8) << 4)
    return (high << 4) | (low & 15)
