"""`OUT/model` of an adapter run: a folder for PEFT (LoRA), or a prefix alone as the original's (P-tuning).

Both load in `chatglm.load`, and in `chatglm.hf`: a LoRA through PEFT, a prefix as docs/transformers.md says.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed
from torch import Tensor, nn

from ...checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ...checkpoint.atomic import whole_folder
from ...checkpoint.layout import PREFIX
from ...checkpoint.saving import dump, save, write_safetensors
from ...config import ModelConfig, to_original
from ...model import GLM
from ..run_config import ModelSettings
from ..sharding import whole
from ..starting import EMBEDDED
from .lora import parts_of


def save_lora(folder: Path, model: nn.Module, peft_config: Any, base: str | None) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`, fp32; a collective where parameters are sharded.

    base  what the folder says it was trained on
    """
    tensors = {
        f"base_model.model.{linear}.lora_{half}.weight": _on_cpu(parameter)
        for linear, half, parameter in parts_of(model)
    }
    if _is_first():
        peft_config.base_model_name_or_path = base
        with (
            whole_folder(folder, sum(tensor.nbytes for tensor in tensors.values()), overwrite=True) as temporary,
            tempfile.TemporaryDirectory() as described,
        ):
            peft_config.save_pretrained(described)
            facts = json.loads((Path(described) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            facts["target_modules"] = sorted(facts["target_modules"])  # PEFT keeps a set
            (temporary / ADAPTER_CONFIG).write_bytes(dump({**facts, "inference_mode": True}))
            write_safetensors(temporary / ADAPTER_WEIGHTS, tensors)
    return folder


def save_prefix(folder: Path, model: GLM, described: ModelConfig, base: str | None) -> Path:
    """Write `transformer.prefix_encoder.*` alone, fp32, with a config.json; a collective.

    described  the base as it is stored, with the prefix
    """
    state = model.transformer.prefix_encoder.state_dict()
    tensors = {PREFIX + name: _on_cpu(tensor) for name, tensor in state.items()}
    if _is_first():
        facts = {**({} if base is None else {"_name_or_path": base}), **to_original(described)}
        save(folder, tensors, described, files={"config.json": dump(facts)}, overwrite=True)
    return folder


def base_name(settings: ModelSettings) -> str | None:
    """How an adapter's folder calls its base: a hub name as it is, a folder with its whole path."""
    source = settings.source
    if source is None or source == EMBEDDED or not Path(source).is_dir():
        return source
    return str(Path(source).resolve())


def _on_cpu(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).float().cpu().contiguous()


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
