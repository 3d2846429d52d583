"""Checkpoints into today's form: safetensors, the slim era, a tuned prefix merged in. Streams one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..tokenizer import complete, read_model_file
from ..tokenizer.model_file import TOKENIZER_FILE
from .folder import QUANTIZATION_RECORD, TOKENIZER_CONFIG, Checkpoint, open_checkpoint, read_json
from .layout import EMBEDDING, HEAD
from .loading import SCALE, Transform, untied
from .problem import FileError
from .reading import holds_same, read_tensor, torch_dtype
from .saving import MAX_SHARD_BYTES, Layout, dump, save
from .tensor_file import ITEM_BYTES, Progress, TensorEntry
from .verifying import check

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
KEPT_FILES = ("LICENSE", "MODEL_LICENSE", "generation_config.json", QUANTIZATION_RECORD)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to_slim: bool = False,
    format: Layout = "safetensors",
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    transform: Transform | None = None,
) -> Path:
    """Write the checkpoint `source` anew as `target`; returns the folder.

    to_slim    a pre-slim checkpoint without its image tokens: rows, ids, config and tokenizer files
    format     "safetensors" (a tied head left out) or "original" (`.bin` shards)
    dtype      fp32, fp16 or bf16 for the floating tensors; None keeps each as stored. Codes and their scales stay
    transform  changes values on the way; names, shapes and what are codes must stay. Floats are cast afterwards
    Raises CheckpointError when the source is broken, its tied head is not the embedding, or the disk is too small.
    """
    check(source, tokenizer=False)
    checkpoint = open_checkpoint(source)
    saving: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "overwrite": overwrite, "progress": progress}
    return _write(checkpoint, target, format, dtype, to_slim=to_slim, transform=transform, **saving)


def convert_ptuning(
    checkpoint: str | Path,
    base: str | Path,
    target: str | Path,
    *,
    format: Layout = "safetensors",
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Merge a P-tuning v2 result (`checkpoint-N`, prefix tensors only) and its base model into one checkpoint.

    Raises CheckpointError where the prefix was made for another base.
    """
    check(base, tokenizer=False)
    merged = open_checkpoint(base).with_prefix(checkpoint)
    saving: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "overwrite": overwrite, "progress": progress}
    return _write(merged, target, format, dtype, **saving)


def _write(
    checkpoint: Checkpoint,
    target: str | Path,
    layout: Layout,
    dtype: str | None,
    *,
    to_slim: bool = False,
    transform: Transform | None = None,
    **saving: Any,
) -> Path:
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"{dtype!r} is no dtype to store weights in", cure=f"use one of {', '.join(DTYPES)}")
    if layout not in ("safetensors", "original"):
        raise CheckpointError(f"{layout!r} is no format of a checkpoint", cure="use safetensors or original")
    if Path(target).resolve() == checkpoint.folder.resolve():
        raise CheckpointError(f"{target} is the source itself", cure="give another target")
    files = small_files(checkpoint, to_slim)
    if transform is not None:
        files.pop(QUANTIZATION_RECORD, None)  # it tells of other values
    if to_slim:
        checkpoint = checkpoint.slim()
    plan = _plan(checkpoint, layout)
    total = sum(entry.elements * ITEM_BYTES[_dtype_of(entry, dtype)] for entry in plan.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for stored, entry in plan.items():
            tensor = read_tensor(entry)
            for name, made in ((stored, tensor),) if transform is None else transform(stored, tensor):
                yield name, made.to(torch_dtype(_dtype_of(plan[name], dtype)))

    return save(target, tensors(), checkpoint.config, files=files, layout=layout, total_bytes=total, **saving)


def _plan(checkpoint: Checkpoint, layout: Layout) -> dict[str, TensorEntry]:
    """What is written, in order. A tied head is checked and then left out, or written again in the original layout."""
    tensors = dict(checkpoint.tensors)
    if checkpoint.config.tied_head:
        for leaf in ("", "_scale"):
            head, table = tensors.pop(HEAD + leaf, None), tensors.get(EMBEDDING + leaf)
            if head is not None and (table is None or not holds_same(head, table)):
                raise FileError(untied(head))
            if layout == "original" and table is not None:
                tensors[HEAD + leaf] = table
    return tensors


def _dtype_of(entry: TensorEntry, dtype: str | None) -> str:
    is_cast = dtype is not None and "float" in entry.dtype and not entry.name.endswith(SCALE)
    return DTYPES[dtype] if is_cast and dtype is not None else entry.dtype


def small_files(checkpoint: Checkpoint, to_slim: bool = False) -> dict[str, bytes]:
    """Tokenizer and licence files of the new folder. No Python file comes along, so `auto_map` goes too."""
    folder = checkpoint.folder
    files = {name: (folder / name).read_bytes() for name in KEPT_FILES if (folder / name).is_file()}
    is_moving = to_slim and checkpoint.config.era == "pre-slim"
    if checkpoint.tokenizer_file is not None:
        raw = checkpoint.tokenizer_file.read_bytes()
        needs_pieces = is_moving and read_model_file(checkpoint.tokenizer_file).is_first_release
        files[TOKENIZER_FILE] = complete(raw) if needs_pieces else raw
    described = read_json(folder / TOKENIZER_CONFIG)
    if described is not None:
        described.pop("auto_map", None)
        if is_moving:
            described.pop("eop_token", None)
            described |= {"eos_token": "<eop>", "end_token": "</s>", "num_image_tokens": 0}
        files[TOKENIZER_CONFIG] = dump(described)
    return files
