"""`chatglm quantize`: a checkpoint in INT8 or INT4, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import GROUP_SIZE, read_config
from .options import CommonOptions, Revision
from .progress import ProgressBar
from .source_folder import source_folder
from .units import format_said, human_bytes

BITS = {"int8": 8, "int4": 4}
FORMATS = ("group", "original")
METHODS = ("rtn", "gptq")


def one_of(*known: str) -> Callable[[str], str]:
    """An option's callback: the value, or a usage error that lists the known ones."""

    def check(value: str) -> str:
        if value not in known:
            raise typer.BadParameter(f"{value!r}; known: {', '.join(known)}")
        return value

    return check


def quantize(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub name", metavar="MODEL")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new checkpoint folder", metavar="DIR")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="int8 or int4 [int4]", metavar="NAME", callback=one_of(*BITS))
    ] = "int4",
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size", help=f"Weights that share a scale [{GROUP_SIZE}, or what divides the model]", metavar="N"
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="group, or original: the packing of the original's checkpoints [group]",
            metavar="NAME",
            callback=one_of(*FORMATS),
        ),
    ] = "group",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="rtn: to the nearest, or gptq: calibrated on text, better and far slower [rtn]",
            metavar="NAME",
            callback=one_of(*METHODS),
        ),
    ] = "rtn",
    embedding_bits: Annotated[
        int | None,
        typer.Option(
            "--embedding-bits", help="Of embedding and head: 8, 4, 0 for floats [8; original: 0]", metavar="N"
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option("--calibration", help="Text for gptq, .txt or .jsonl (repeatable) [shipped]", metavar="FILE"),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option("--calibration-tokens", help="At most so many [98304]", metavar="N", min=1)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which examples, where the text is longer", metavar="N")] = 0,
    device: Annotated[
        str, typer.Option("--device", help="Where gptq computes: auto, cpu, cuda, cuda:N", metavar="NAME")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in DIR")] = False,
    revision: Revision = None,
    common: CommonOptions,
) -> None:
    """Write a checkpoint with INT8 or INT4 weights; any form can be the source.

    One tensor is in memory at a time (with gptq: one layer and the calibration text on its way through it). DIR appears
    whole or not at all; an interrupted run goes on where it was when the same command is given again.

    Try next: chatglm chat DIR
    """
    if format == "original" and group_size:
        raise typer.BadParameter("--format original has one scale a row: leave --group-size out")
    text: dict[str, Any] = {"files": tuple(calibration)} if calibration else {}
    text |= {"most_tokens": calibration_tokens} if calibration_tokens else {}
    terminal = common.terminal()
    folder = source_folder(source, revision)

    from ..engine.placement import choose_device
    from ..quantization.calibration_text import CalibrationText
    from ..quantization.recipe import Recipe
    from ..quantization.writing import quantize_checkpoint

    group = 0 if format == "original" else group_size
    words = CalibrationText(**text, seed=seed)
    recipe = Recipe(BITS[dtype], group, embedding_bits, method, words)  # type: ignore[arg-type]
    with ProgressBar(terminal) as progress:
        quantize_checkpoint(
            folder,
            out,
            recipe,
            device=choose_device(device) if method == "gptq" else "cpu",
            overwrite=overwrite,
            progress=progress,
        )
    facts = described(out)
    if common.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        said = format_said(facts["bits"], facts["group_size"], facts["embedding_bits"])
        print(f"Saved to {out}: {said}, {facts['method']}, {human_bytes(facts['weight_bytes'])}")
        terminal.note(f"Try: chatglm chat {out}")


def described(out: Path) -> dict[str, Any]:
    """What was written, from its own files."""
    record: dict[str, Any] = json.loads((out / "quantization.json").read_text(encoding="utf-8"))
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return {"folder": str(out), "weight_bytes": weights, "era": read_config(out / "config.json").era, **record}
