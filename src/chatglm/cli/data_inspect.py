"""`chatglm data inspect`: what is in prepared data, and its rows as the model sees them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import CommonOptions
from .units import human_bytes, plural

if TYPE_CHECKING:
    from ..training.data.prepared import PreparedSet

LONGEST_TABLE = 400
"""Tokens of a row that are listed one by one, unless told otherwise."""


def inspect(
    data: Annotated[Path, typer.Argument(help="A prepared set, or a mixture file", metavar="DATA")],
    *,
    row: Annotated[
        list[int] | None,
        typer.Option("--row", help="Show this row, counted over epochs (repeatable) [0]", metavar="N", min=0),
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", help="Tokens of a row [2048, or the set's]", metavar="N", min=8)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the order and the blanks", metavar="N")] = 0,
    objective: Annotated[
        str | None, typer.Option("--objective", help="Another mixture of blank infilling for texts", metavar="NAME")
    ] = None,
    encoding: Annotated[str, typer.Option("--positions", help="2d or 1d", metavar="NAME")] = "2d",
    tokens: Annotated[
        int, typer.Option("--tokens", help="List at most so many of a row", metavar="N", min=0)
    ] = LONGEST_TABLE,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its sha256 first")] = False,
    common: CommonOptions,
) -> None:
    """Show rows as the model sees them: ids, pieces, positions, a picture of the mask, and what is trained.

    Try: chatglm data inspect corpus --row 0 --row 1
    """
    if encoding not in ("2d", "1d"):
        raise typer.BadParameter(f"{encoding!r}; known: 2d, 1d", param_hint="--positions")

    from ..training.data.inspecting import described_row, mask_picture
    from ..training.data.opening import ingredients_of, open_stream
    from ..training.data.prepared import PreparedSet

    ingredients = ingredients_of(data)
    sets = list({one.set: PreparedSet.open(one.set) for one in ingredients}.values())
    damaged = [line for one in sets for line in one.verify()] if verify else []
    wanted = length or max(one.index["made_of"]["layout"]["length"] for one in sets)
    stream = open_stream(data, length=wanted, seed=seed, objective=objective, encoding=encoding, with_sources=True)
    tokenizer = sets[0].tokenizer()
    rows = []
    for index in row or [0]:
        samples = stream.row(index)
        facts = described_row(samples, tokenizer, wanted)
        rows.append({"row": index, **facts, "mask": mask_picture(samples)})
    if common.json:
        about = {"sets": [summary(one) for one in sets], "rows_per_epoch": stream.rows_per_epoch, "damaged": damaged}
        print(json.dumps({**about, "rows": rows}, ensure_ascii=False))
    else:
        for one in sets:
            print(told(summary(one)))
        print(f"{plural(stream.rows_per_epoch, 'row')} of {wanted:,} tokens an epoch")
        for facts in rows:
            _show(facts, tokens, wanted)
        for line in damaged:
            print(line)
    if damaged:
        raise typer.Exit(1)


def summary(found: PreparedSet) -> dict[str, Any]:
    """What a set holds."""
    sources = sorted(found.index["sources"], key=lambda source: -source["tokens"])
    return {
        "folder": str(found.folder),
        **found.amounts,
        "vocab_size": found.index["vocab_size"],
        "layout": found.index["made_of"]["layout"],
        "problems": found.index["problems"]["counts"],
        "sources": sources,
    }


def told(facts: dict[str, Any]) -> str:
    """A set in a line, its largest sources in one each."""
    parts = []
    if facts["texts"]:
        parts.append(f"{plural(facts['texts'], 'text')} of {facts['text_tokens']:,} tokens")
    if facts["samples"]:
        parts.append(f"{plural(facts['samples'], 'sample')} of {facts['sample_tokens']:,} tokens")
    lines = [f"{facts['folder']}: {', '.join(parts)}, {human_bytes(facts['bytes'])}"]
    lines += [f"  {source['tokens']:>13,} tokens  {source['name']}" for source in facts["sources"][:5]]
    if len(facts["sources"]) > 5:
        lines.append(f"  and {plural(len(facts['sources']) - 5, 'more source')}")
    return "\n".join(lines)


def _show(facts: dict[str, Any], tokens: int, length: int) -> None:
    """One row: a table of tokens for each sample, then the mask."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 110)
    used, trained = facts["tokens"], facts["loss_tokens"]
    console.print(
        f"\nRow {facts['row']}: {used:,} of {length:,} tokens, {trained:,} trained", markup=False, style="bold"
    )
    left = tokens
    for number, sample in enumerate(facts["samples"]):
        source = f", from {sample['source']}" if sample["source"] else ""
        cut = f", {sample['cut_targets']} targets cut" if sample["cut_targets"] else ""
        size = len(sample["ids"])
        sizes = f"{size:,} tokens, {sample['context_length']:,} of context"
        title = f"Sample {number}: {sample['objective']}, {sizes}{cut}{source}"
        console.print(title, markup=False)
        table = Table(box=None, pad_edge=False, show_edge=False)
        for name, justify in (
            ("i", "right"),
            ("id", "right"),
            ("piece", "left"),
            ("position", "right"),
            ("block", "right"),
        ):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        table.add_column("predicts")
        for i in range(min(size, left)):
            target = sample["target_pieces"][i]
            in_context = i < sample["context_length"]
            table.add_row(
                str(i),
                str(sample["ids"][i]),
                Text(sample["pieces"][i]),
                str(sample["positions"][i]),
                str(sample["block_positions"][i]),
                Text("" if target is None else f"{target} ({sample['targets'][i]})"),
                style="dim" if in_context else "",
            )
        if left:
            console.print(table)
        if size > left:
            console.print(f"… {size - min(size, left):,} more tokens (--tokens N)", style="dim", markup=False)
        left = max(0, left - size)
    console.print("Who sees whom (a line is a query, █ all, ▒ some, · none):", markup=False)
    for line in facts["mask"]:
        console.print(f"  {line}", markup=False)
