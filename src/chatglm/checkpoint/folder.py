"""A checkpoint folder as a value: its description and where each tensor lies. Opening reads no tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import IMAGE_TOKENS, ModelConfig, read_config
from ..errors import CheckpointError
from ..tokenizer.model_file import TOKENIZER_FILE
from .layout import EMBEDDING, HEAD, PREFIX, ROTARY, expected_tensors
from .problem import PULL, FileError, Problem
from .releases import known_sizes, release_name
from .tensor_file import TensorEntry, list_tensors

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
QUANTIZATION_RECORD = "quantization.json"
"""How a quantised checkpoint was made; beside config.json, read by `chatglm info`."""
SHARD = re.compile(r"(model|pytorch_model)-(\d{5})-of-(\d{5})\.(safetensors|bin)")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder in order, and which file the index gives each tensor (empty without an index)."""

    names: tuple[str, ...]
    index: Mapping[str, str]

    def promised(self, name: str) -> list[str]:
        """The tensors that the index puts into the file `name`, rotary buffers left out."""
        return [tensor for tensor, file in self.index.items() if file == name and not tensor.endswith(ROTARY)]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: `tensors` by name (rotary buffers left out), each with its file and place.

    Views of it (`slim`, `with_prefix`) are checkpoints too: nothing is read before a tensor is.
    """

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, TensorEntry]
    tokenizer_file: Path | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored, a stored head included."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        """The weight files, in the order in which their tensors are listed."""
        return list(dict.fromkeys(entry.file for entry in self.tensors.values()))

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes stored in each dtype, largest first."""
        counts: dict[str, int] = {}
        for entry in self.tensors.values():
            counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.nbytes
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def release(self) -> str | None:
        """The release whose file sizes these are (`v1.1.0 or v0.1.0`), or None. A note: tuned weights have them too."""
        return release_name(self.files)

    @property
    def is_prefix_only(self) -> bool:
        """Whether only a P-tuning v2 prefix is here, which loads over its base."""
        return bool(self.tensors) and all(name.startswith(PREFIX) for name in self.tensors)

    def slim(self) -> Checkpoint:
        """The same weights in the slim era: the first 20,000 rows of embedding and head left out, ids moved down.

        Returns self for a slim checkpoint. The tokenizer file stays that of the folder (`convert` derives the other).
        """
        if self.config.era == "slim":
            return self
        rows = [name for name in self.tensors if name.startswith((EMBEDDING, HEAD))]  # their scales too
        cut = {name: self.tensors[name].from_row(IMAGE_TOKENS) for name in rows}
        return replace(self, config=self.config.slim(), tensors={**self.tensors, **cut})

    def with_prefix(self, folder: str | Path) -> Checkpoint:
        """The base with the P-tuning v2 prefix of another folder; prefix sizes are read from its tensor shapes.

        Raises CheckpointError where the prefix was made for a model of other sizes.
        """
        folder = Path(folder)
        prefix = {name: entry for name, entry in list_weights(folder).items() if name.startswith(PREFIX)}
        table = prefix.get(f"{PREFIX}embedding.weight")
        if table is None or len(table.shape) != 2:
            raise CheckpointError(
                f"{folder} holds no `{PREFIX}embedding.weight`",
                cure="give the folder of a P-tuning v2 checkpoint (checkpoint-N)",
            )
        projection = f"{PREFIX}trans.0.weight" in prefix
        config = replace(self.config, pre_seq_len=table.shape[0], prefix_projection=projection)
        for name, spec in expected_tensors(config).items():
            found = prefix.get(name) if name.startswith(PREFIX) else None
            if name.startswith(PREFIX) and (found is None or found.shape != spec.shape):
                stored = "is missing" if found is None else f"is {list(found.shape)}"
                raise CheckpointError(
                    f"{folder}: {name} {stored}; with {config.num_layers} layers of {config.hidden_size} it must be "
                    f"{list(spec.shape)}",
                    cure="this prefix was made for another base model: load it over that one",
                )
        base = {name: entry for name, entry in self.tensors.items() if not name.startswith(PREFIX)}
        return replace(self, config=config, tensors={**base, **prefix})


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """List the tensors of a checkpoint folder without reading them.

    Original shards (`pytorch_model*.bin`) and safetensors, single or sharded. Raises CheckpointError for a folder or
    file that is missing or broken, ConfigError for a config.json that cannot be. `verify` says more.
    """
    folder = Path(folder)
    require_folder(folder)
    config = read_config(folder / CONFIG)
    tokenizer = folder / TOKENIZER_FILE
    tensors = list_weights(folder, known_sizes(config))
    return Checkpoint(folder, config, tensors, tokenizer if tokenizer.is_file() else None)


def require_folder(folder: Path) -> None:
    """Raises CheckpointError unless `folder` is one."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}", cure=f"give a checkpoint folder; to download one: {PULL}")


def list_weights(folder: Path, sizes: Mapping[str, int] | None = None) -> dict[str, TensorEntry]:
    """All tensors of a folder by name, rotary buffers left out. Raises FileError at the first broken file."""
    files = weight_files(folder)
    listed = [list_tensors(folder / name, (sizes or {}).get(name)) for name in files.names]
    return merge(listed, files)


def merge(listed: Iterable[Mapping[str, TensorEntry]], files: WeightFiles) -> dict[str, TensorEntry]:
    """The tensors of several files as one list; where two hold the same name, the index decides."""
    tensors: dict[str, TensorEntry] = {}
    for found in listed:
        for name, entry in found.items():
            if name.endswith(ROTARY):
                continue
            if name in tensors and files.index.get(name) != entry.file.name:
                continue
            tensors[name] = entry
    return tensors


def weight_files(folder: Path) -> WeightFiles:
    """Which files hold the weights: safetensors before `.bin`, by the index, or by name where the index is lost.

    Raises FileError when there are none and for an index that is damaged or leads out of the folder.
    """
    for single in (SAFETENSORS, BIN):
        if (folder / f"{single}{INDEX}").is_file():
            index = _read_index(folder / f"{single}{INDEX}")
            return WeightFiles(tuple(sorted(set(index.values()))), index)
        if (folder / single).is_file():
            return WeightFiles((single,), {})
        stem, suffix = single.split(".")
        shards = [SHARD.fullmatch(path.name) for path in folder.glob(f"{stem}-*-of-*.{suffix}")]
        counts = {int(shard[3]) for shard in shards if shard}
        if counts:
            count = max(counts)
            return WeightFiles(tuple(f"{stem}-{k + 1:05d}-of-{count:05d}.{suffix}" for k in range(count)), {})
    raise FileError(
        Problem(
            str(folder),
            f"holds no weights: neither {SAFETENSORS} nor {BIN}, nor shards of either",
            f"give a checkpoint folder; to download one: {PULL}",
        )
    )


def _read_index(path: Path) -> dict[str, str]:
    cure = f"download it again into {path.parent}: {PULL}"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = dict(index.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(Problem(path.name, f"is not a readable index ({error})", cure)) from error
    for tensor, name in entries.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise FileError(Problem(path.name, f"names {name!r}, which is no file of this folder", cure, tensor))
    return entries


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file is absent or is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
