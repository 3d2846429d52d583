"""What the commands of `chatglm train` share: the run file, its flags, the forecast, and the end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import CommonOptions

if TYPE_CHECKING:
    from ..training.loop import Report
    from ..training.run_config import RunConfig

RunFile = Annotated[Path | None, typer.Argument(help="YAML file of the run", metavar="FILE", show_default=False)]


@dataclass(frozen=True)
class RunOptions:
    """Flags over the run file; `--set` reaches every key."""

    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder", metavar="DIR")] = None
    set: Annotated[
        list[str] | None, typer.Option("--set", help="A key of the file, as optimizer.lr=1e-4", metavar="KEY=VALUE")
    ] = None
    steps: Annotated[int | None, typer.Option("--steps", help="Updates", metavar="N", min=1)] = None
    seed: Annotated[int | None, typer.Option("--seed", help="Of all that is drawn", metavar="N", min=0)] = None
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate", metavar="X")] = None
    source: Annotated[
        str | None, typer.Option("--model", help="Where to start: folder, hub name, embedded", metavar="MODEL")
    ] = None
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Prepared data (repeatable)", metavar="DIR", show_default=False)
    ] = None
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N", metavar="NAME")] = None
    precision: Annotated[str | None, typer.Option("--precision", help="fp32, bf16, fp16", metavar="NAME")] = None
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where DIR holds checkpoints")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, tell memory and time, stop")] = False

    def flags(self) -> dict[str, Any]:
        """Dotted keys and what was given."""
        return {
            "out": None if self.out is None else str(self.out),
            "steps": self.steps,
            "seed": self.seed,
            "optimizer.lr": self.lr,
            "model.source": self.source,
            "data.train": self.data or None,
            "compute.device": self.device,
            "compute.precision": self.precision,
        }


def run_stage(
    kind: type[RunConfig],
    stage: Callable[..., Report],
    file: Path | None,
    options: RunOptions,
    common: CommonOptions,
    dry_run: Callable[[Any], dict[str, Any]],
    try_next: str = "chatglm chat {model}",
) -> None:
    """Read, forecast, train, report.

    dry_run  checks data and model of a run and returns what --dry-run prints under "forecast" and "data"
    """
    from ..training.run_config import read_run

    terminal = common.terminal()
    run = read_run(file, kind, changes=options.set or (), flags=options.flags())
    if options.dry_run:
        facts = dry_run(run)
        lines = facts.pop("lines")
        print(json.dumps(facts, ensure_ascii=False) if common.json else "\n".join(lines))
        return
    is_first = os.environ.get("RANK", "0") == "0"
    say = _line_writer(terminal.shows_notes) if is_first and not common.quiet else None
    report = stage(run, progress=say, restart=options.restart)
    if not is_first:
        return
    if say is not None and terminal.shows_notes:
        sys.stderr.write("\n")
    facts = report_of(report)
    if common.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print("\n".join(_lines(report)))
        if report.model is not None:
            terminal.note(f"Try: {try_next.format(model=report.model)}")
    if not report.finished:
        raise typer.Exit(130)  # interrupted


def report_of(report: Report) -> dict[str, Any]:
    """A report as JSON has it."""
    return {
        "out": str(report.out),
        "step": report.step,
        "tokens": report.tokens,
        "loss": report.loss if report.losses else None,
        "evaluation": report.evaluation,
        "seconds": round(report.seconds, 3),
        "nonfinite": report.nonfinite,
        "restores": report.restores,
        "finished": report.finished,
        "stopped": report.stopped,
        "model": None if report.model is None else str(report.model),
    }


def _lines(report: Report) -> list[str]:
    state = "Done" if report.finished else "Stopped; the same command goes on"
    figures = [f"step {report.step:,}", f"{report.tokens:,} tokens"]
    figures += [f"loss {report.loss:.4f}"] if report.losses else []
    figures += [f"{name.replace('_', ' ')} {value:.4f}" for name, value in report.evaluation.items()]
    lines = [f"{state}: {', '.join(figures)}"]
    if report.nonfinite or report.restores:
        lines.append(
            f"{report.nonfinite} steps skipped (non-finite gradients), {report.restores} spikes gone back from"
        )
    if report.model is not None:
        lines.append(f"Saved to {report.model}")
    return lines


def _line_writer(is_terminal: bool) -> Callable[[str], None]:
    """A line in the place of the one before on a terminal, else one below the other."""

    def say(line: str) -> None:
        sys.stderr.write(f"\r{line}\x1b[K" if is_terminal else f"{line}\n")
        sys.stderr.flush()

    return say
