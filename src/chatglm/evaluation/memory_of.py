"""Bytes of the weights in a form, by arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

from ..checkpoint import expected_tensors, open_checkpoint
from .forms import Form, description

FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def weight_bytes_of(folder: Path, form: Form) -> int:
    """Bytes of all weights, scales included, a tied head once; what is not quantised counts as fp16."""
    wanted = description(open_checkpoint(folder).config, form)
    item = FLOAT_BYTES.get(form.name, 2)
    specs = [spec for spec in expected_tensors(wanted).values() if not spec.is_optional]
    return sum(math.prod(spec.shape) * (1 if spec.is_codes else item) for spec in specs)
