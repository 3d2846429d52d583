"""Adapter folders: a LoRA in PEFT's format, or a P-tuning v2 prefix alone. Listed without reading, checked by shape.

A LoRA adds scaling · up · down to the weight of a linear; PEFT writes `adapter_config.json` and
`adapter_model.safetensors` with the names of `base_model.model.` + the linear. A prefix is the original's
`checkpoint-N` (`transformer.prefix_encoder.*`). Source: LoRA (Hu et al. 2021) §4.1; spec/training.md §3.3.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError
from .folder import BIN, INDEX, SAFETENSORS, list_weights
from .layout import LAYER_LINEARS, PREFIX, linear_shapes
from .tensor_file import TensorEntry, list_tensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OLD_ADAPTER_WEIGHTS = "adapter_model.bin"
LORA_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "enable_lora": (None, [True]),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "megatron_config": (None,),
}
"""Settings of PEFT that change more than a sum of low-rank products, with the values that do not."""


@dataclass(frozen=True)
class LowRank:
    """scaling · up · down is added to one weight. down: [rank, in], up: [out, rank]."""

    down: TensorEntry
    up: TensorEntry
    scaling: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class LoraAdapter:
    """Low-rank parts by the name of their linear (`transformer.layers.0.attention.query_key_value`).

    base  the model that the folder says it was trained on, or None
    """

    folder: Path
    parts: Mapping[str, LowRank]
    base: str | None = None

    def check_fits(self, config: ModelConfig) -> None:
        """Raises CheckpointError for a part that the model has no linear for, or of another size."""
        shapes = linear_shapes(config)
        for name, part in self.parts.items():
            match = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", name)
            found = (part.up.shape[0], part.down.shape[1])
            if match is None or match[2] not in LAYER_LINEARS or int(match[1]) >= config.num_layers:
                raise CheckpointError(
                    f"{self.folder}: the model has no linear {name} ({config.num_layers} layers of "
                    f"{', '.join(LAYER_LINEARS)})",
                    cure="load the adapter over the model that it was trained on",
                )
            if found != shapes[match[2]]:
                raise CheckpointError(
                    f"{self.folder}: {name} is made for a weight {list(found)}, the model's is "
                    f"{list(shapes[match[2]])}",
                    cure="load the adapter over the model that it was trained on",
                )


@dataclass(frozen=True)
class PrefixAdapter:
    """A P-tuning v2 prefix: tensors under their names in a checkpoint."""

    folder: Path
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    base: str | None = None


Adapter = LoraAdapter | PrefixAdapter


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return not (folder / "config.json").is_file()
    has_weights = any((folder / name).is_file() for name in (SAFETENSORS, BIN, SAFETENSORS + INDEX, BIN + INDEX))
    return has_weights and _holds_only_a_prefix(folder)


def open_adapter(folder: str | Path) -> Adapter:
    """List an adapter folder. Raises CheckpointError for what is no adapter, is broken, or needs more than sums."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such adapter folder", cure="give OUT/model of a tuning")
    if (folder / ADAPTER_CONFIG).is_file():
        return _open_lora(folder)
    try:
        tensors = {name: entry for name, entry in list_weights(folder).items() if name.startswith(PREFIX)}
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} holds no adapter: neither {ADAPTER_CONFIG} (LoRA) nor weights of a P-tuning prefix",
            cure="give OUT/model of a tuning, or a folder that PEFT saved",
        ) from error
    if not tensors:
        raise CheckpointError(
            f"{folder} holds a model and no adapter: no `{PREFIX}*` and no {ADAPTER_CONFIG}",
            cure=f"load it as a model: `chatglm chat {folder}`",
        )
    return PrefixAdapter(folder, tensors, _stated_base(folder))


def _holds_only_a_prefix(folder: Path) -> bool:
    try:
        names = list_weights(folder)
    except CheckpointError:
        return False
    return bool(names) and all(name.startswith(PREFIX) for name in names)


def _open_lora(folder: Path) -> LoraAdapter:
    settings = _read_settings(folder / ADAPTER_CONFIG)
    kind = str(settings.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise CheckpointError(
            f"{folder}: the adapter is a {kind} of PEFT; LORA can be loaded here",
            cure="merge it with PEFT (merge_and_unload) and load the result as a model",
        )
    for key, allowed in _UNSUPPORTED.items():
        if key in settings and settings[key] not in allowed:
            raise CheckpointError(
                f"{folder}: the adapter has `{key}` {settings[key]!r}, which is more than a low-rank sum",
                cure="merge it with PEFT (merge_and_unload) and load the result as a model",
            )
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        file = folder / OLD_ADAPTER_WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{folder} lacks {ADAPTER_WEIGHTS}", cure="copy the whole adapter folder")
    halves: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in list_tensors(file).items():
        match = LORA_NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{file}: `{name}` is no part of a LoRA on linears")
        halves.setdefault(match[1], {})[match[2]] = entry
    if not halves:
        raise CheckpointError(f"{file} holds no tensors")
    parts = {module: _low_rank(folder, module, found, settings) for module, found in halves.items()}
    return LoraAdapter(folder, parts, settings.get("base_model_name_or_path") or None)


def _low_rank(folder: Path, module: str, halves: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> LowRank:
    if set(halves) != {"A", "B"}:
        raise CheckpointError(f"{folder}: {module} has lora_{next(iter(halves))} alone", cure="copy the file again")
    down, up = halves["A"], halves["B"]
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
        raise CheckpointError(
            f"{folder}: {module} has lora_A {list(down.shape)} and lora_B {list(up.shape)}, which do not fit together"
        )
    alpha = _of_module(settings.get("alpha_pattern") or {}, module, settings.get("lora_alpha", 8))
    rank = _of_module(settings.get("rank_pattern") or {}, module, settings.get("r", down.shape[0]))
    if rank != down.shape[0]:
        raise CheckpointError(f"{folder}: {module} has rank {down.shape[0]}, {ADAPTER_CONFIG} says {rank}")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha)
    if not is_number:
        raise CheckpointError(f"{folder}: `lora_alpha` is {alpha!r}; it must be a number")
    return LowRank(down, up, alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)


def _of_module(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error})", cure="copy the adapter again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__}, not an object")
    return found


def _stated_base(folder: Path) -> str | None:
    """What this package's tuning notes beside a prefix."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    stated = _read_settings(path).get("_name_or_path")
    return stated if isinstance(stated, str) and stated else None
