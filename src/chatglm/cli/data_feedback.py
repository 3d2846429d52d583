"""`chatglm data feedback`: what people said about answers, as training data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RequestError
from .conversation import write_beside
from .options import CommonOptions
from .units import plural

if TYPE_CHECKING:
    from ..server.feedback.export import Exported

SHOWN = 5
"""Conflicts told one by one; above that they are a number."""


def feedback(
    db: Annotated[list[Path], typer.Option("--db", help="A server's --feedback-db (repeatable)", metavar="FILE")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; - is stdout", metavar="FILE")],
    form: Annotated[str, typer.Option("--format", help="pairs, sft, jsonl or csv [pairs]", metavar="FORM")] = "pairs",
    since: Annotated[
        str | None, typer.Option("--since", help="Only what was said from this day on", metavar="DATE")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Only answers of this model", metavar="NAME")] = None,
    min_rating: Annotated[
        int | None, typer.Option("--min-rating", help="Only answers rated so high", metavar="N", min=1, max=5)
    ] = None,
    redact: Annotated[bool, typer.Option("--redact", help="Hide addresses, numbers and the names of raters")] = False,
    common: CommonOptions,
) -> None:
    """Write the ratings and corrections of one or several servers as training data.

    pairs: {prompt, history, chosen, rejected, …} for `chatglm train`; sft: {messages} with corrected and liked answers;
    jsonl, csv: every opinion with everything that is known of it. Raters who contradict each other are reported and
    left out. The server may go on writing meanwhile.

    Try: chatglm data feedback --db feedback.db --out pairs.jsonl
    """
    from ..server.feedback.export import FORMATS, Filters, export, parse_time
    from ..server.feedback.reading import read_rows

    if form not in FORMATS:
        raise typer.BadParameter(f"{form!r} is none of {', '.join(FORMATS)}", param_hint="--format")
    try:
        filters = Filters(parse_time(since) if since else None, model, min_rating, redact)
    except RequestError as error:
        raise typer.BadParameter(error.message, param_hint="--since") from error
    exported = export(read_rows(db), form, filters)
    if str(out) == "-":
        sys.stdout.write(exported.text)
    else:
        _write(out, exported.text)
    if common.json:
        print(json.dumps(summary(exported), ensure_ascii=False), file=sys.stderr if str(out) == "-" else sys.stdout)
    elif not common.quiet:
        _tell(exported, form, out)


def summary(exported: Exported) -> dict[str, object]:
    """Counts, for programs."""
    conflicts = [{"answer_ids": c.answer_ids, "raters": c.raters, "what": c.what} for c in exported.conflicts]
    return {
        "opinions": exported.read,
        "written": exported.count,
        "by_source": exported.by_source,
        "conflicts": conflicts,
    }


def _write(path: Path, text: str) -> None:
    try:
        write_beside(path, text)
    except OSError as error:
        raise RequestError(
            f"{path}: cannot be written ({error.strerror})", cure="name a file in a folder that exists"
        ) from error


def _tell(exported: Exported, form: str, out: Path) -> None:
    def say(text: str) -> None:
        print(text, file=sys.stderr)

    sources = ", ".join(f"{count} {source}" for source, count in exported.by_source.items())
    what = {"pairs": "pair", "sft": "example"}.get(form, "row")
    by_source = f" ({sources})" if sources else ""
    say(f"{plural(exported.read, 'opinion')} read, {plural(exported.count, what)} written{by_source}")
    for conflict in exported.conflicts[:SHOWN]:
        say(f"left out: {' and '.join(conflict.answer_ids)}: {conflict.what} ({', '.join(conflict.raters)})")
    if len(exported.conflicts) > SHOWN:
        say(f"left out: {len(exported.conflicts) - SHOWN} more conflicts (--json lists all)")
    if str(out) != "-":
        say(f"Saved to {out}.")
