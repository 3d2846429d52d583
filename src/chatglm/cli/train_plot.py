"""`chatglm train plot`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import CommonOptions


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders", metavar="RUN...")],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Picture: .png, .svg, .pdf [curves.png in RUN]", metavar="FILE")
    ] = None,
    common: CommonOptions,
) -> None:
    """Draw loss, learning rate, gradient norms and speed of runs, several in one picture.

    Try: chatglm train plot runs/pretrain runs/sft --out curves.png
    """
    from ..training.plotting import plot as draw

    target = out or (runs[0] if runs[0].is_dir() else runs[0].parent) / "curves.png"
    panels = draw(runs, target)
    print(json.dumps({"picture": str(target), "panels": panels}) if common.json else f"Saved to {target}")
