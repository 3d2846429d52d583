"""Forms of weights by name, and a model in each of them: what the quality suite compares.

A quantised form is quantised and then expanded to fp32 again: what is measured is what the weights lost, the same on
every device and with every kernel (those have their own tests against these weights).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import load_into, open_checkpoint
from ..config import ModelConfig
from ..engine.placement import DTYPES
from ..errors import RequestError
from ..model import GLM
from ..quantization import convert_on_load, dequantize_model, swap_as_described
from ..quantization.calibration import quantize_with_calibration
from ..quantization.calibration_text import CalibrationText
from ..quantization.recipe import Recipe
from ..tokenizer import Tokenizer

_NAME = re.compile(r"int(?P<bits>[48])(?:-(?P<row>row)|-g(?P<group>\d+))?(?:-e(?P<tables>[048]))?(?P<gptq>-gptq)?")

STORED = "stored"
"""The weights as the checkpoint has them."""

EVERY_FORM = (
    "fp32",
    "fp16",
    "bf16",
    "int8-row",
    "int8",
    "int4-row",
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int4-g64-e4",
    "int4-g32-gptq",
    "int4-g64-gptq",
    "int4-g128-gptq",
)
"""What the suite compares unless told otherwise."""


@dataclass(frozen=True)
class Form:
    """A dtype (fp32, fp16, bf16), `stored`, or a recipe."""

    name: str
    recipe: Recipe | None = None


def form_named(name: str) -> Form:
    """`fp32`, `fp16`, `bf16`, `stored`, or `int4` / `int8` with endings in this order.

    `-row` (the original's packing) or `-gN` (groups of N), `-eN` (bits of embedding and head), `-gptq` (calibrated).
    Raises RequestError for anything else.
    """
    if name in DTYPES or name == STORED:
        return Form(name)
    match = _NAME.fullmatch(name)
    if match is None:
        raise RequestError(
            f"{name!r} is no form of weights",
            cure=f"use {', '.join(DTYPES)}, {STORED}, or one like int8-row, int4-g32, int4-g64-e4, int4-g64-gptq",
        )
    group = 0 if match["row"] else int(match["group"]) if match["group"] else None
    tables = int(match["tables"]) if match["tables"] else None
    recipe = Recipe(int(match["bits"]), group, tables, "gptq" if match["gptq"] else "rtn")
    return Form(name, recipe)


def description(config: ModelConfig, form: Form) -> ModelConfig:
    """The weights of `form` for a checkpoint with this config."""
    if form.recipe is not None:
        return form.recipe.applied_to(config)
    return config if form.name == STORED else config.quantized(0)


def _fits(config: ModelConfig, form: Form) -> bool:
    size = 0 if form.recipe is None else form.recipe.group_size or 0
    return not (size and (config.hidden_size % size or config.inner_hidden_size % size))


def fitting_forms(folder: Path) -> tuple[str, ...]:
    """The names in EVERY_FORM whose groups divide the matrices of this checkpoint."""
    config = open_checkpoint(folder).config
    return tuple(name for name in EVERY_FORM if _fits(config, form_named(name)))


def model_in(folder: Path, form: Form, device: torch.device, text: CalibrationText | None = None) -> GLM:
    """The model of a checkpoint folder in this form, ready to be scored. text: what to calibrate on, if need be."""
    checkpoint = open_checkpoint(folder)
    config, wanted = checkpoint.config, description(checkpoint.config, form)
    is_calibrated = form.recipe is not None and form.recipe.method == "gptq"
    first = config.quantized(0) if is_calibrated else wanted
    with torch.device("meta"):
        model = swap_as_described(GLM(config.quantized(0)), first)
    dtype = DTYPES.get(form.name, torch.float32)
    load_into(model, checkpoint, dtype=dtype, device=device, transform=convert_on_load(config, first))
    if is_calibrated:
        tokenizer = Tokenizer.from_folder(folder, config=config)
        examples = (text or CalibrationText()).examples(tokenizer, config.max_sequence_length)
        quantize_with_calibration(model, wanted, examples)
    if model.config.quantization_bit:
        dequantize_model(model, torch.float32)
    return model.requires_grad_(False).eval()
