"""From a checkpoint folder to a model that is ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..checkpoint import check, estimate_memory, load_into, open_checkpoint
from ..config import ModelConfig
from ..model import GLM
from ..quantization import dequantize_model, swap_linears
from ..tokenizer import Tokenizer
from .placement import WEIGHT_FORMATS, Placement, choose_placement, normalize_dtype

Progress = Callable[[int, int, str], None]
"""(bytes done, bytes in all, what) while something long runs."""

SMALL_MODEL_BYTES = 1 << 30
"""A quantised checkpoint smaller than this when expanded to fp32 is expanded: faster, and the memory does not
matter."""


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, with its tokenizer. `weights` names the form of the linears: fp32, fp16, bf16, int8,
    int4.
    """

    model: GLM
    tokenizer: Tokenizer
    config: ModelConfig
    folder: Path
    placement: Placement
    weights: str


def load_model(
    folder: Path, dtype: str = "auto", device: str = "auto", *, progress: Progress | None = None
) -> LoadedModel:
    """Load a checkpoint folder: verified first, then built without memory, then filled one tensor at a time.

    dtype   auto, fp32, fp16, bf16 (a quantised checkpoint is expanded), int8, int4 (weights only)
    device  auto, cpu, cuda, cuda:N, mps
    Raises CheckpointError, ConfigError, TokenizerError or DeviceError before memory is spent.
    """
    check(folder)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    tokenizer = Tokenizer.from_folder(folder, config=config)
    dtype = normalize_dtype(dtype)
    fp32_bytes = config.num_parameters * 4
    bits = config.quantization_bit
    expand = bits != 0 and (dtype not in ("auto", f"int{bits}") or (dtype == "auto" and fp32_bytes < SMALL_MODEL_BYTES))
    is_packed = (bits != 0 and not expand) or dtype in WEIGHT_FORMATS
    resident = estimate_memory(config, f"int{bits or dtype[-1]}") if is_packed else fp32_bytes
    placement = choose_placement(device, "auto" if dtype in WEIGHT_FORMATS else dtype, resident)

    plain = replace(config, quantization_bit=0, quantization_embeddings=False)
    with torch.device("meta"):
        model = GLM(plain)
        if bits:
            swap_linears(model, bits, embeddings=config.quantization_embeddings)
    load_into(model, checkpoint, dtype=placement.dtype, device=placement.device, progress=progress)
    if expand:
        dequantize_model(model, placement.dtype)
        config = plain
    if dtype in WEIGHT_FORMATS and not (bits and not expand):
        swap_linears(model, int(dtype[-1]), embeddings=True)
        config = replace(config, quantization_bit=int(dtype[-1]), quantization_embeddings=True)
    model.requires_grad_(False)
    model.eval()
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    weights = f"int{config.quantization_bit}" if config.quantization_bit else names[placement.dtype]
    return LoadedModel(model, tokenizer, config, folder, placement, weights)
