"""`chatglm verify`: every fault of a checkpoint before memory is spent on it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from .options import CommonOptions, Revision, Source
from .progress import ProgressBar
from .source_folder import source_folder
from .units import plural


def verify(
    source: Source = None,
    *,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte too: checksums, NaN and infinity by tensor, an untied head")
    ] = False,
    revision: Revision = None,
    common: CommonOptions,
) -> None:
    """Check files, headers, shapes and the tokenizer: missing, truncated, a Git-LFS pointer, of another release.

    Prints one line and exits with 0, or every problem with file, tensor and cure and exits with 1.

    Try next: chatglm chat MODEL
    """
    from ..checkpoint import verify as find_problems

    terminal = common.terminal()
    folder = source_folder(source, revision)
    with ProgressBar(terminal) as progress:
        progress.say(f"checking {folder}")
        problems = find_problems(folder, deep, progress=progress)
    if common.json:
        print(
            json.dumps({"folder": str(folder), "problems": [asdict(p) for p in problems]}, ensure_ascii=False, indent=2)
        )
    elif problems:
        print(*problems, sep="\n")
        terminal.complain(f"{plural(len(problems), 'problem')} in {folder}")
    else:
        how = "every byte was read" if deep else "files, headers, shapes and tokenizer; --deep also reads the values"
        print(f"{folder} is fit to load ({how})")
        terminal.note("Try: chatglm chat" + ("" if source is None else f" {source}"))
    if problems:
        raise typer.Exit(1)
