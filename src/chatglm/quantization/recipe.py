"""How a checkpoint is to be quantised, and the record of it that stays with the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .. import __version__
from ..config import ModelConfig
from ..errors import QuantizationError
from .calibration_text import CalibrationText
from .gptq import DAMPING
from .group_format import CLIP_FACTORS
from .row_format import check_bits

Method = Literal["rtn", "gptq"]

METHODS: tuple[Method, ...] = ("rtn", "gptq")


@dataclass(frozen=True)
class Recipe:
    """Bits, format and method.

    bits            of the linears, 4 or 8
    group_size      columns that share a scale; 0 is the original's row-wise packing; None: what fits the model
    embedding_bits  of embedding and head, 8 or 4, or 0 to leave them; None: 8, and 0 in the original's packing
    method          rtn: each weight to its nearest code, with a search for the best scale of each group in INT4.
                    gptq: the linears calibrated on text, embedding and head as in rtn
    calibration     the text, where the method needs one
    Raises QuantizationError for a combination that does not exist.
    """

    bits: int
    group_size: int | None = None
    embedding_bits: int | None = None
    method: Method = "rtn"
    calibration: CalibrationText = field(default_factory=CalibrationText)

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.method not in METHODS:
            raise QuantizationError(f"{self.method!r} is no method", cure=f"use one of {', '.join(METHODS)}")
        if self.method == "gptq" and self.group_size == 0:
            raise QuantizationError("the original's row-wise packing is plain rounding", cure="use groups with gptq")
        if self.embedding_bits not in (None, 0, 4, 8):
            raise QuantizationError(f"embedding and head cannot have {self.embedding_bits} bits", cure="use 8, 4 or 0")
        if self.group_size == 0 and self.embedding_bits not in (None, 0, self.bits):
            raise QuantizationError(
                f"the original's packing has INT{self.bits} everywhere, or embedding and head as floats",
                cure=f"use {self.bits} or 0 bits for embedding and head",
            )

    def applied_to(self, config: ModelConfig) -> ModelConfig:
        """The description of the result. Raises ConfigError for a group size that does not divide its matrices."""
        embedding_bits = self.embedding_bits
        if embedding_bits is None and self.group_size == 0:
            embedding_bits = 0
        return config.quantized(self.bits, self.group_size, embedding_bits)

    def record(self, result: ModelConfig) -> dict[str, Any]:
        """What `quantization.json` says of the recipe; the calibration and the source are added by who knows them."""
        group_size = result.quantization_group_size
        found: dict[str, Any] = {
            "made_by": f"chatglm {__version__}",
            "bits": result.quantization_bit,
            "packing": "group" if group_size else "original",
            "group_size": group_size,
            "embedding_bits": result.embedding_bits,
            "method": self.method,
        }
        if group_size and result.quantization_bit == 4:
            found["clip_factors"] = list(CLIP_FACTORS)
        if self.method == "gptq":
            found["damping"] = DAMPING
        return found
