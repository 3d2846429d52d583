"""`OUT/model`: the trained weights as a checkpoint that `chatglm.load`, `chatglm serve` and AutoModel open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..checkpoint import save
from ..model import GLM
from .run_config import RunConfig
from .sharding import World, whole
from .starting import tokenizer_file

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export(glm: GLM, target: Path, run: RunConfig, world: World, precision: str) -> Path:
    """Write the model folder from all processes' parts, one tensor at a time; a collective.

    precision  of the run, which `export.dtype` "auto" takes over
    """
    from .preparing import DTYPES

    name = precision if run.export.dtype == "auto" else run.export.dtype
    dtype = DTYPES[name]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in glm.state_dict().items():
            if not (glm.config.tied_head and key.startswith("lm_head.")):
                value = whole(tensor)
                yield key, value.to(dtype) if value.is_floating_point() else value

    if world.is_first:
        config = replace(glm.config, torch_dtype=TORCH_NAMES[name])
        save(target, tensors(), config, tokenizer_file=tokenizer_file(run.model), overwrite=True)
    else:
        for _ in tensors():
            pass
    world.barrier()
    return target
