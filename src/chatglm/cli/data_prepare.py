"""`chatglm data prepare`: a corpus in ids, in memory-mapped files that training reads."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .data_options import LayoutOptions, ReadingOptions
from .options import CommonOptions
from .progress import ProgressBar
from .units import human_bytes, plural

if TYPE_CHECKING:
    from ..training.data.prepared import PreparedSet


def prepare(
    inputs: Annotated[
        list[str], typer.Argument(help="Files, folders, archives; - is stdin", metavar="INPUT…", show_default=False)
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write", metavar="DIR")],
    reading: ReadingOptions,
    layout: LayoutOptions,
    end_of_text: Annotated[
        str,
        typer.Option("--end-of-text", help="The piece behind every text [</s>]", metavar="PIECE", show_default=False),
    ] = "</s>",
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Processes [as many as cores]", metavar="N", min=1, show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was prepared otherwise")] = False,
    common: CommonOptions,
) -> None:
    """Turn texts and dialogues into ids, once, for every training run.

    Reads .txt, .jsonl and .json in the formats of docs/training-data.md, plain or in .gz, .xz, .bz2, .zst, .tar files.
    A bad record stops the run with file and line unless --allow passes over its kind. DIR appears whole or not at all;
    an interrupted run goes on where it was when the same command is given again.

    Try next: chatglm data inspect DIR
    """
    terminal = common.terminal()
    how = reading.reading()

    from ..training.data import preparing
    from ..training.data.problems import Allowance

    preparation = preparing.Preparation(
        tuple(inputs),
        layout.tokenizer_path(),
        layout.layout(),
        how,
        end_of_text,
        reading.form,  # type: ignore[arg-type]
        Allowance.parse(reading.allow or ()),
    )
    began = time.monotonic()
    with ProgressBar(terminal) as progress:
        progress.say("Reading the tokenizer")
        found = preparing.prepare(preparation, out, workers=workers, overwrite=overwrite, progress=progress)
    seconds = time.monotonic() - began
    facts = summary(found, seconds)
    was_read = seconds >= found.index["seconds"] and not found.index["blocks_kept_from_before"]
    facts["tokens_per_s"] = round((facts["text_tokens"] + facts["sample_tokens"]) / seconds) if was_read else None
    if common.json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    print(f"Saved to {out}: {said(facts)}")
    for kind, count in facts["problems"].items():
        passed = "kept" if kind == "contradiction" else "left out"
        print(f"  {kind}: {count:,} {passed}")
    rate = f"{facts['tokens_per_s']:,} tokens/s. " if was_read else ""
    terminal.note(f"{rate}Try: chatglm data inspect {out}")


def summary(found: PreparedSet, seconds: float) -> dict[str, Any]:
    """What was written, for programs."""
    return {
        "folder": str(found.folder),
        **found.amounts,
        "sources": len(found.sources),
        "left_out": found.index["left_out"],
        "samples_with_dropped_rounds": found.index["samples_with_dropped_rounds"],
        "problems": found.index["problems"]["counts"],
        "seconds": round(seconds, 1),
    }


def said(facts: dict[str, Any]) -> str:
    """`12,876 texts (7,450,584 tokens), 4,760 samples of dialogues (2,041,278 tokens), 31.2 MB`."""
    parts = []
    if facts["texts"]:
        parts.append(f"{plural(facts['texts'], 'text')} ({facts['text_tokens']:,} tokens)")
    if facts["samples"]:
        parts.append(f"{plural(facts['samples'], 'sample')} of dialogues ({facts['sample_tokens']:,} tokens)")
    return ", ".join([*parts, human_bytes(facts["bytes"])])
