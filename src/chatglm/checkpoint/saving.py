"""Writing checkpoints: sharded safetensors under the original names, or the original's own `.bin` shards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import ModelConfig, to_original
from ..tokenizer.model_file import TOKENIZER_FILE
from .atomic import whole_folder
from .folder import BIN, CONFIG, INDEX, SAFETENSORS, TOKENIZER_CONFIG
from .layout import HEAD, expected_tensors
from .tensor_file import ITEM_BYTES, SAFETENSORS_DTYPES, Progress

Layout = Literal["safetensors", "original"]

MAX_SHARD_BYTES = 2_000_000_000
_SAFETENSORS_NAMES = {name: code for code, name in SAFETENSORS_DTYPES.items()}


def save(
    folder: str | Path,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    *,
    tokenizer_file: str | Path | None = None,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    layout: Layout = "safetensors",
    overwrite: bool = False,
    total_bytes: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint folder, whole or not at all; returns it.

    tensors          names as in the checkpoint; may come one at a time, at most one shard of them is held
    tokenizer_file   copied as ice_text.model, with the tokenizer_config.json beside it where there is one
    files            further small files by name
    max_shard_bytes  largest weight file; a model that fits one is not sharded
    layout           "safetensors", where a tied `lm_head` is left out, or "original" (torch zip files)
    overwrite        replace a checkpoint that is there; other files of the folder stay
    total_bytes      size of all tensors, where they come one at a time and the config's arithmetic is not it
    Raises CheckpointError when the disk is too small, naming both numbers, or the target holds a checkpoint.
    """
    if total_bytes is None:
        total_bytes = _size(tensors, config)
    small = {CONFIG: dump(to_original(config)), **tokenizer_files(tokenizer_file), **(files or {})}
    needed = total_bytes + sum(len(data) for data in small.values())
    with whole_folder(Path(folder), needed, overwrite=overwrite) as temporary:
        for name, data in small.items():
            (temporary / name).write_bytes(data)
        shards = Shards(temporary, layout, max_shard_bytes)
        done = 0
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            if layout == "original" or not (config.tied_head and name.startswith(HEAD)):
                shards.add(name, tensor.detach())
            done += tensor.nbytes
            if progress is not None:
                progress(min(done, total_bytes), total_bytes, "saving weights")
        shards.finish()
    return Path(folder)


class Shards:
    """Collects tensors up to a size, then writes them as one file; names and index come last."""

    def __init__(self, folder: Path, layout: Layout, largest: int) -> None:
        self.folder, self.layout, self.largest = folder, layout, largest
        self.held: dict[str, Tensor] = {}
        self.held_bytes = self.total_bytes = 0
        self.written: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor; what is held so far is written first if this would make the file too large."""
        if self.held and self.held_bytes + tensor.nbytes > self.largest:
            self.flush()
        self.held[name] = tensor
        self.held_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def flush(self) -> None:
        """Write what is held as a file of its own."""
        part = self.folder / f"part-{len(self.written):05d}"
        (write_safetensors if self.layout == "safetensors" else write_torch_zip)(part, self.held)
        self.written.append(list(self.held))
        self.held, self.held_bytes = {}, 0

    def finish(self, stated_bytes: int | None = None) -> None:
        """Write the rest, give the files their names, and write the index if there are several."""
        if self.held or not self.written:
            self.flush()
        single = SAFETENSORS if self.layout == "safetensors" else BIN
        stem, suffix = single.split(".")
        count = len(self.written)
        names = [single] if count == 1 else [f"{stem}-{k + 1:05d}-of-{count:05d}.{suffix}" for k in range(count)]
        for k, name in enumerate(names):
            (self.folder / f"part-{k:05d}").rename(self.folder / name)
        if count > 1:
            where = {tensor: name for name, held in zip(names, self.written, strict=True) for tensor in held}
            size = self.total_bytes if stated_bytes is None else stated_bytes
            index = {"metadata": {"total_size": size}, "weight_map": where}
            (self.folder / f"{single}{INDEX}").write_bytes(dump(index))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file. Wide dtypes first, so that every tensor is aligned. Extra memory: one tensor at most."""
    head, order = safetensors_head(
        {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}
    )
    with path.open("wb") as file:
        file.write(head)
        for name in order:
            file.write(raw_bytes(tensors[name]))


def safetensors_head(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Everything before the values of a safetensors file, and where in the file each tensor begins, in file order.

    shapes  dtype (torch's name) and shape by tensor name
    """
    order = sorted(shapes, key=lambda name: -ITEM_BYTES[shapes[name][0]])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    starts: dict[str, int] = {}
    end = 0
    for name in order:
        dtype, shape = shapes[name]
        starts[name], end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as they lie in a file, row by row."""
    view: memoryview = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view


def write_torch_zip(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One `.bin` file as the original has them: a dictionary of tensors in torch's zip form."""
    torch.save({name: _own(tensor.cpu()) for name, tensor in tensors.items()}, path)


def _own(tensor: Tensor) -> Tensor:
    """The tensor without a larger storage around it, which torch would write whole."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def dump(value: object) -> bytes:
    """JSON as the original's files have it: indented, Chinese readable."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def tokenizer_files(tokenizer_file: str | Path | None) -> dict[str, bytes]:
    """The tokenizer file under its name, with the tokenizer_config.json beside it where there is one."""
    if tokenizer_file is None:
        return {}
    path = Path(tokenizer_file)
    found = {TOKENIZER_FILE: path.read_bytes()}
    beside = path.with_name(TOKENIZER_CONFIG)
    if beside.is_file():
        found[TOKENIZER_CONFIG] = beside.read_bytes()
    return found


def _size(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], config: ModelConfig) -> int:
    """Bytes to be written: of the tensors where they are all there, else by the config."""
    if isinstance(tensors, Mapping):
        return sum(tensor.nbytes for tensor in tensors.values())
    if isinstance(tensors, list | tuple):
        return sum(tensor.nbytes for _, tensor in tensors)
    item = ITEM_BYTES.get(config.torch_dtype, 2)
    specs = expected_tensors(config).values()
    return sum(spec.elements * (1 if spec.is_codes else item) for spec in specs if not spec.is_optional)
