"""`chatglm convert`: a checkpoint in today's form, with a tuned prefix, or of random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..config import ModelConfig, read_config
from .options import CommonOptions, Revision, dtype_name
from .progress import ProgressBar
from .source_folder import EMBEDDED_MODEL, source_folder
from .streams import Terminal

if TYPE_CHECKING:
    from ..checkpoint.saving import Layout

RANDOM_SIZES = ("6b", "6b-preslim", "mini")
FORMATS = ("safetensors", "original")


def _one_of(known: tuple[str, ...]) -> Callable[[str | None], str | None]:
    def check(value: str | None) -> str | None:
        if value is not None and value not in known:
            raise typer.BadParameter(f"{value!r}; known: {', '.join(known)}")
        return value

    return check


def _dtype_name(value: str | None) -> str | None:
    return None if value is None else dtype_name(value)


def convert(
    source: Annotated[str | None, typer.Argument(help="Checkpoint folder or hub name", metavar="MODEL")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new checkpoint folder", metavar="DIR")],
    to_slim: Annotated[bool, typer.Option("--to-slim", help="Drop the 20,000 image tokens of a pre-slim one")] = False,
    ptuning: Annotated[
        Path | None, typer.Option("--ptuning", help="A P-tuning v2 result (checkpoint-N); needs --base", metavar="DIR")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="A LoRA or prefix to merge into its base; needs --base", metavar="DIR"),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The model that prefix or adapter was tuned on", metavar="MODEL")
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            "--random",
            help=f"Random weights of this size instead: {', '.join(RANDOM_SIZES)}",
            metavar="SIZE",
            callback=_one_of(RANDOM_SIZES),
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="safetensors, or original (.bin shards) [safetensors; --random: original]",
            metavar="NAME",
            callback=_one_of(FORMATS),
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="fp32, fp16, bf16; --random: int8, int4 too [as stored]",
            metavar="NAME",
            callback=_dtype_name,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="ice_text.model to put beside random weights", metavar="FILE")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random weights", metavar="N", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in DIR")] = False,
    revision: Revision = None,
    common: CommonOptions,
) -> None:
    """Write a checkpoint anew: safetensors from .bin, slim from pre-slim, base and tuned prefix or LoRA as one.

    One tensor is in memory at a time, and DIR appears whole or not at all.

    Try next: chatglm verify DIR
    """
    if sum(what is not None for what in (source, ptuning, adapter, random)) != 1:
        raise typer.BadParameter("name one of MODEL, --ptuning or --adapter DIR with --base MODEL, or --random SIZE")
    if (ptuning is None and adapter is None) != (base is None):
        raise typer.BadParameter("--ptuning or --adapter and --base belong together")
    if random is not None and dtype not in (None, "fp16", "int8", "int4"):
        raise typer.BadParameter("--random writes fp16, int8 or int4")
    terminal = common.terminal()
    layout = cast("Layout", format or ("original" if random else "safetensors"))
    with ProgressBar(terminal) as progress:
        progress.say("starting PyTorch")
        if random is not None:
            from ..checkpoint import random_checkpoint

            random_checkpoint(
                out,
                random_config(random, dtype),
                seed,
                layout,
                tokenizer_file=tokenizer,
                overwrite=overwrite,
                progress=progress,
            )
        elif ptuning is not None:
            from ..checkpoint import convert_ptuning

            convert_ptuning(
                ptuning,
                source_folder(base, revision),
                out,
                format=layout,
                dtype=dtype,
                overwrite=overwrite,
                progress=progress,
            )
        elif adapter is not None:
            from ..training.adapters.merging import merge_adapter

            folder = source_folder(base, revision)
            if read_config(folder / "config.json").quantization_bit:
                terminal.note("the base is quantised: its weights are expanded, added to and quantised again")
            merge_adapter(adapter, folder, out, format=layout, dtype=dtype, overwrite=overwrite, progress=progress)
        else:
            from ..checkpoint import convert as convert_checkpoint

            convert_checkpoint(
                source_folder(source, revision),
                out,
                to_slim=to_slim,
                format=layout,
                dtype=dtype,
                overwrite=overwrite,
                progress=progress,
            )
    report(out, terminal, as_json=common.json)


def random_config(size: str, dtype: str | None) -> ModelConfig:
    """The description behind a size; int8 and int4 in the original's packing."""
    config = ModelConfig()
    if size == "6b-preslim":
        moved = {name: getattr(config, name) + 20_000 for name in _IDS}
        config = replace(config, vocab_size=150_528, **moved)
    elif size == "mini":
        config = replace(read_config(EMBEDDED_MODEL / "config.json"), quantization_bit=0, quantization_embeddings=False)
    bits = {"int8": 8, "int4": 4}.get(dtype or "", 0)
    return replace(config, quantization_bit=bits)


_IDS = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")


def report(out: Path, terminal: Terminal, *, as_json: bool) -> None:
    """What was written, and what to do with it."""
    config = read_config(out / "config.json")
    facts: dict[str, Any] = {
        "folder": str(out),
        "era": config.era,
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
        "pre_seq_len": config.pre_seq_len,
        "prefix_projection": config.prefix_projection,
    }
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    prefix = ""
    if config.pre_seq_len is not None:
        projection = "with" if config.prefix_projection else "without"
        prefix = f", tuned prefix of {config.pre_seq_len} vectors {projection} projection"
    print(f"Saved to {out}: {facts['bytes']:,} bytes, {config.era} era{prefix}")
    terminal.note(f"Try: chatglm verify {out} && chatglm chat {out}")
