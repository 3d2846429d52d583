"""`chatglm info`: what a checkpoint is and what it needs, from its description and file headers; no tensor is read."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..config import ModelConfig, read_config
from ..errors import CheckpointError, DownloadError, TokenizerError
from .options import CommonOptions, Revision, Source
from .source_folder import source_folder
from .units import format_said, human_bytes, plural

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

_STATED = re.compile(r"^(?:license:|\*\*Licence:)\s*(.+?)\s*$", re.MULTILINE | re.IGNORECASE)
"""Where a card says its licence: a key of its front matter, or a bold sentence."""

_LICENCE_NAMES = ("licen", "copying", "notice")


def info(source: Source = None, *, revision: Revision = None, common: CommonOptions) -> None:
    """Sizes, dtypes, era, parameters, memory needed in each dtype, licence and tokenizer with their hashes.

    Nothing is loaded.

    Try next: chatglm verify MODEL
    """
    problem: CheckpointError | None = None
    try:
        folder = source_folder(source, revision)
        facts, problem = gather(folder)
    except DownloadError:
        if source is None or (config := released_config(source)) is None:
            raise
        folder, facts = None, {"folder": f"{source} is not downloaded", **_of_config(config), **_of_memory(config)}
    if common.json:
        print(json.dumps({**facts, "problem": problem and str(problem)}, ensure_ascii=False, indent=2))
    else:
        for line in lines(facts):
            print(line)
    if problem is not None:
        if not common.json:
            common.terminal().complain(str(problem))
        raise typer.Exit(1)
    common.terminal().note(f"Try: chatglm pull {source}" if folder is None else f"Try: chatglm verify {folder}")


def released_config(name: str) -> ModelConfig | None:
    """The description of an official repository by its name, so that memory can be told before a download."""
    found = re.fullmatch(r"(?:THUDM|zai-org)/chatglm-6b(?:-(int4|int8))?(-qe)?", name)
    if found is None or (found[2] and not found[1]):
        return None
    bits = int(found[1][3:]) if found[1] else 0
    return ModelConfig(quantization_bit=bits, quantization_embeddings=found[2] is not None)


def gather(folder: Path) -> tuple[dict[str, Any], CheckpointError | None]:
    """Facts by name, and what is wrong with the weight files when they cannot be listed."""
    from ..checkpoint import open_checkpoint
    from ..checkpoint.folder import QUANTIZATION_RECORD, read_json

    problem: CheckpointError | None = None
    checkpoint: Checkpoint | None = None
    try:
        checkpoint = open_checkpoint(folder)
        config = checkpoint.config
    except CheckpointError as error:
        if not (folder / "config.json").is_file():
            raise
        config, problem = read_config(folder / "config.json"), error
    facts: dict[str, Any] = {"folder": str(folder), **_of_config(config)}
    if checkpoint is not None:
        facts |= _of_files(checkpoint)
    facts |= _of_memory(config)
    facts["quantization"] = read_json(folder / QUANTIZATION_RECORD)
    facts["tokenizer"] = _of_tokenizer(folder)
    facts["licences"] = [
        {"file": path.name, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if any(name in path.name.lower() for name in _LICENCE_NAMES) and path.is_file()
    ]
    card = folder / "README.md"
    stated = _STATED.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    facts["licence_in_card"] = stated and stated.group(1).replace("**", "")
    return facts, problem


def _of_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "era": config.era,
        "parameters": config.num_parameters,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "rows": config.vocab_size,
        "max_sequence_length": config.max_sequence_length,
        "quantization_bit": config.quantization_bit,
        "quantization_group_size": config.quantization_group_size,
        "quantization_embeddings": config.quantization_embeddings,
        "embedding_bits": config.embedding_bits,
        "pre_seq_len": config.pre_seq_len,
        "prefix_projection": config.prefix_projection,
    }


def _of_memory(config: ModelConfig) -> dict[str, Any]:
    from ..checkpoint import cache_bytes, weight_bytes
    from ..checkpoint.memory import DTYPES

    tokens = config.max_sequence_length
    return {
        "memory": [
            {"dtype": dtype, "weights": weight_bytes(config, dtype), "cache": cache_bytes(config, dtype, tokens)}
            for dtype in DTYPES
        ]
    }


def _of_files(checkpoint: Checkpoint) -> dict[str, Any]:
    from ..checkpoint.releases import releases_of_sizes

    sizes = {path.name: path.stat().st_size for path in checkpoint.files}
    return {
        "releases_of_this_size": [release.name for release in releases_of_sizes(sizes)],
        "tensors": len(checkpoint.tensors),
        "stored_bytes": checkpoint.nbytes,
        "dtypes": checkpoint.dtypes,
        "files": [{"file": name, "bytes": size} for name, size in sizes.items()],
    }


def _of_tokenizer(folder: Path) -> dict[str, Any] | None:
    from ..tokenizer.model_file import TOKENIZER_FILE, read_model_file

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    facts: dict[str, Any] = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    try:
        file = read_model_file(path)
    except TokenizerError as error:
        return {**facts, "error": str(error)}
    return {**facts, "pieces": file.stored_pieces, "release": file.release}


def sha256(path: Path) -> str:
    """Hexadecimal hash of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _record_lines(record: dict[str, Any]) -> dict[str, str]:
    """How the weights were quantised, as their record says; keys that it lacks are left out."""
    shown = {"  how": ", by ".join(str(record[key]) for key in ("method", "made_by") if key in record)}
    if text := record.get("calibration"):
        files = ", ".join(f"{file['file']} ({file['sha256'][:16]}…)" for file in text.get("files", ()))
        shown["  calibrated on"] = f"{text.get('tokens', 0):,} tokens of {files}, seed {text.get('seed')}"
    if source := record.get("source"):
        dtypes = ", ".join(source.get("dtypes", {}))
        shown["  from"] = f"{source.get('folder')} ({dtypes})"
    return shown


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as a person reads them."""
    shown = {
        "folder": facts["folder"],
        "era": facts["era"],
        "parameters": f"{facts['parameters']:,}",
        "shape": f"{facts['layers']} layers, hidden {facts['hidden_size']:,}, {facts['heads']} heads",
        "vocabulary": f"{facts['rows']:,} rows",
        "context": f"{facts['max_sequence_length']:,} tokens, question and answer together",
    }
    if facts["quantization_bit"]:
        bits, size = facts["quantization_bit"], facts["quantization_group_size"]
        shown["quantised"] = format_said(bits, size, facts["embedding_bits"])
        if (record := facts.get("quantization")) is not None:
            shown |= _record_lines(record)
    if facts["pre_seq_len"] is not None:
        projection = "with" if facts["prefix_projection"] else "without"
        shown["tuned prefix"] = f"{facts['pre_seq_len']} vectors, {projection} projection"
    if releases := facts.get("releases_of_this_size"):
        shown["release"] = f"{' or '.join(releases)} (by the sizes of the files)"
    if "files" in facts:
        dtypes = ", ".join(f"{name} {human_bytes(size)}" for name, size in facts["dtypes"].items())
        shown["tensors"] = f"{facts['tensors']}: {dtypes}"
        total = sum(file["bytes"] for file in facts["files"])
        shown["files"] = f"{plural(len(facts['files']), 'weight file')}, {human_bytes(total)}"
    if (tokenizer := facts.get("tokenizer")) is not None:
        shown["tokenizer"] = f"{tokenizer['file']}, sha256 {tokenizer['sha256']}"
        if "error" in tokenizer:
            shown["  is broken"] = tokenizer["error"]
        else:
            shown["  pieces"] = f"{tokenizer['pieces']:,}" + (
                f", the released file ({tokenizer['release']})" if tokenizer["release"] else ", no released file"
            )
    for licence in facts.get("licences", ()):
        shown[f"licence {licence['file']}"] = f"sha256 {licence['sha256']}"
    if facts.get("licence_in_card"):
        shown["licence in README.md"] = facts["licence_in_card"]
    elif not facts.get("licences", True):
        shown["licence"] = "no licence file in this folder"
    width = max(map(len, shown))
    table = [f"{name:<{width}}  {value}" for name, value in shown.items()]
    for file in facts.get("files", ()):
        table.append(f"  {file['bytes']:>16,} bytes  {file['file']}")
    table.append(f"{'memory':<8}{'weights':>12}{'+ cache':>12}{'= needed':>12}   (one conversation of full length)")
    for row in facts["memory"]:
        numbers = (row["weights"], row["cache"], row["weights"] + row["cache"])
        table.append(f"  {row['dtype']:<6}" + "".join(f"{human_bytes(number):>12}" for number in numbers))
    return table
