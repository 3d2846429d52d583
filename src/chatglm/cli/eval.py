"""`chatglm eval`: numbers that can be repeated, from local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from .conversation import write_beside
from .options import CommonOptions, Revision
from .progress import ProgressBar
from .quantize import one_of
from .source_folder import source_folder
from .units import plural

SUITES = ("quality",)


def eval(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Checkpoint folders or hub names [the embedded model]", metavar="MODEL...", show_default=False
        ),
    ] = None,
    *,
    suite: Annotated[
        str, typer.Option("--suite", help="quality [quality]", metavar="NAME", callback=one_of(*SUITES))
    ] = "quality",
    forms: Annotated[
        str | None,
        typer.Option(
            "--forms",
            help="Comma-separated: fp32, fp16, bf16, int8-row, int4-g32, int4-g64-e4, int4-g64-gptq, … [all that fit]",
            metavar="LIST",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Score this .jsonl or .txt instead of the own text (repeatable)", metavar="FILE"),
    ] = None,
    most: Annotated[
        int | None,
        typer.Option("--most", help="So many dialogues, or spans of a text, of each file", metavar="N", min=1),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the calibration text of gptq forms", metavar="N")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table in Markdown")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write it to a file", metavar="FILE")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N", metavar="NAME")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads", metavar="N", min=1)] = None,
    revision: Revision = None,
    common: CommonOptions,
) -> None:
    """What each form of the weights costs: perplexity, bits per byte, distance and agreement against fp32.

    One MODEL: its weights in every form, quantised here. Several: each as it is stored, against the first in fp32.
    The text is the project's own, in Chinese and English, and is never calibrated on; docs/quantization.md says exactly
    what is scored. The same command gives the same numbers again.

    Try: chatglm eval --forms fp16,int8,int4 --most 20
    """
    if forms is not None and sources is not None and len(sources) > 1:
        raise typer.BadParameter("--forms needs a single MODEL; several are compared as they are stored")
    terminal = common.terminal()
    folders = tuple(source_folder(source, revision) for source in sources or ())
    folders = folders or (source_folder(None),)

    import torch

    from ..engine.placement import choose_device, physical_cores
    from ..evaluation.forms import fitting_forms
    from ..evaluation.quality import OWN_TEXT, QualitySettings, measure_quality
    from ..evaluation.table import as_markdown, as_text, rows_of
    from ..quantization.calibration_text import CalibrationText

    torch.set_num_threads(threads or physical_cores())
    settings = QualitySettings(
        folders,
        tuple(name.strip() for name in forms.split(",")) if forms else fitting_forms(folders[0]),
        tuple(text) if text else OWN_TEXT,
        most,
        choose_device(device),
        CalibrationText(seed=seed),
    )
    with ProgressBar(terminal, unit="tokens") as progress:
        report = measure_quality(settings, progress)
    if common.json:
        shown = json.dumps(report, ensure_ascii=False, indent=2)
    else:
        table = rows_of(report)
        shown = as_markdown(table) if markdown else as_text(table)
    print(shown)
    if out is not None:
        try:
            write_beside(out, f"{shown}\n")
        except OSError as error:
            raise RequestError(f"{out} cannot be written ({error.strerror})") from error
    if not common.json:
        terminal.note(summary(report))
        terminal.note("Try: chatglm quantize MODEL --dtype int4 --out DIR")


def summary(report: dict[str, Any]) -> str:
    """What was scored, on one line."""
    files = plural(len(report["files"]), "file")
    return (
        f"{report['scored_tokens']:,} tokens ({report['scored_bytes']:,} bytes) of {files} scored "
        f"on {report['device']}; "
        f"reference: fp32, perplexity {report['reference_perplexity']:.3f}; "
        "divergence in thousandths of a nat a token"
    )
