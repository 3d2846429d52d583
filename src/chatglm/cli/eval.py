"""`chatglm eval`: numbers that can be repeated, from local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from .conversation import write_beside
from .eval_suites import SUITES, Asked, judge_settings
from .options import CommonOptions, Revision
from .progress import ProgressBar
from .quantize import one_of
from .source_folder import source_folder


def eval(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Checkpoint folders or hub names [the embedded model]", metavar="MODEL...", show_default=False
        ),
    ] = None,
    *,
    suite: Annotated[
        str,
        typer.Option("--suite", help=f"{', '.join(SUITES)} [quality]", metavar="NAME", callback=one_of(*SUITES)),
    ] = "quality",
    forms: Annotated[
        str | None,
        typer.Option(
            "--forms",
            help="quality: fp32, fp16, bf16, int8-row, int4-g32, int4-g64-e4, int4-g64-gptq, … [all that fit]",
            metavar="LIST",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", help="quality, ability: this .jsonl or .txt instead of the own text (repeatable)", metavar="FILE"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="answers: questions with wanted answers, JSON lines", metavar="FILE"),
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option("--prompt-column", help="answers: its field [prompt, content, …]", metavar="NAME")
    ] = None,
    answer_column: Annotated[
        str | None, typer.Option("--answer-column", help="answers: its field [response, summary, …]", metavar="NAME")
    ] = None,
    judge: Annotated[
        dict[str, Any] | None,
        typer.Option(
            "--judge",
            help="answers: what passes, as full_sentence,max_characters=80,keyword=please",
            metavar="RULES",
            parser=judge_settings,
        ),
    ] = None,
    official: Annotated[
        bool, typer.Option("--official-sampling", help="answers: top-p 0.7, temperature 0.95 instead of greedy")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="answers: longest answer [128]", metavar="N", min=1)
    ] = 128,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="answers: also write them as JSON lines", metavar="FILE")
    ] = None,
    most: Annotated[
        int | None,
        typer.Option("--most", help="So many dialogues, spans of a text or questions, of each file", metavar="N"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of calibration, blanks and sampling", metavar="N")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table in Markdown")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write it to a file", metavar="FILE")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N", metavar="NAME")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads", metavar="N", min=1)] = None,
    revision: Revision = None,
    common: CommonOptions,
) -> None:
    """Measure models. The same command gives the same numbers again.

    quality: what each form of the weights costs against fp32, on the project's own Chinese and English text, which is
    never calibrated on (docs/quantization.md). One MODEL: its weights in every form. Several: each as it is stored.

    ability: bits per byte, easy questions and blanks; several models are shown beside the first: before and after.

    answers: BLEU-4 and ROUGE of answers to --data as the official script defines them; with --judge the share that
    passes and the win-rate.

    Try: chatglm eval --forms fp16,int8,int4 --most 20
    """
    if forms is not None and sources is not None and len(sources) > 1:
        raise typer.BadParameter("--forms needs a single MODEL; several are compared as they are stored")
    if suite == "answers" and data is None:
        raise typer.BadParameter("--suite answers needs --data FILE")
    terminal = common.terminal()
    folders = tuple(source_folder(source, revision) for source in sources or ()) or (source_folder(None),)

    import torch

    from ..engine.placement import physical_cores

    torch.set_num_threads(threads or physical_cores())
    asked = Asked(
        folders, forms, tuple(text or ()), data, prompt_column, answer_column, judge, official, max_new_tokens,
        predictions, most, seed, device,
    )  # fmt: skip
    run, unit = SUITES[suite]
    with ProgressBar(terminal, unit=unit) as progress:
        measured = run(asked, progress)
    shown = json.dumps(measured.report, ensure_ascii=False, indent=2) if common.json else measured.table(markdown)
    print(shown)
    if out is not None:
        try:
            write_beside(out, f"{shown}\n")
        except OSError as error:
            raise RequestError(f"{out} cannot be written ({error.strerror})") from error
    if not common.json:
        for line in measured.notes:
            terminal.note(line)
