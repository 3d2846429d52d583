"""`chatglm data mix`: several prepared sets as one stream, by weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import CommonOptions

if TYPE_CHECKING:
    from ..training.data.opening import Ingredient


def mix(
    sets: Annotated[
        list[str],
        typer.Argument(
            help="Prepared sets, DIR[:text|:dialogue|:instruction][=WEIGHT]; without weights each has its size",
            metavar="SET…",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The mixture file to write", metavar="FILE", show_default=False)
    ] = None,
    texts: Annotated[
        str,
        typer.Option("--texts", help="joined: cut in rows; apart: each a sample of its own [joined]", metavar="HOW"),
    ] = "joined",
    objective: Annotated[
        str,
        typer.Option("--objective", help="Blank infilling of texts, as in chatglm-6b, glm-10b, gpt", metavar="NAME"),
    ] = "chatglm-6b",
    length: Annotated[
        int, typer.Option("--length", help="Tokens of a row, for the figures", metavar="N", min=8)
    ] = 2048,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Of the run, for the epochs of each set", metavar="N", min=1)
    ] = None,
    common: CommonOptions,
) -> None:
    """Give prepared sets their shares of a training run; training reads the file in the place of a set.

    Of every thousand rows each set has its number, in a random order that depends on the seed alone. No row of a set
    comes twice before all of its rows came.

    Try: chatglm data mix corpus=0.7 chats:dialogue=0.3 --out mixture.json
    """
    from ..training.data.opening import open_stream, write_mixture

    ingredients = [ingredient(word, texts, objective) for word in sets]
    facts = []
    streams = [open_stream([one], length=length, seed=0) for one in ingredients]
    weights = [one.weight for one in ingredients]
    given = [float(s.rows_per_epoch) if w is None else w for s, w in zip(streams, weights, strict=True)]
    open_stream(ingredients, length=length, seed=0)  # refuses weights that cannot be shares
    rows = None if tokens is None else tokens / length
    for one, stream, weight in zip(ingredients, streams, given, strict=True):
        share = weight / sum(given)
        epochs = None if rows is None else round(rows * share / stream.rows_per_epoch, 3)
        facts.append(
            {
                "set": one.set,
                "part": one.part,
                "share": round(share, 4),
                "rows": stream.rows_per_epoch,
                "epochs": epochs,
            }
        )
    if out is not None:
        write_mixture(out, ingredients)
    if common.json:
        print(json.dumps({"mixture": None if out is None else str(out), "sets": facts}, ensure_ascii=False))
        return
    for line in lines(facts):
        print(line)
    if out is not None:
        print(f"Saved to {out}")
        common.terminal().note(f"Try: chatglm data inspect {out}")


def ingredient(word: str, texts: str, objective: str) -> Ingredient:
    """From `DIR`, `DIR=0.3`, `DIR:text=0.3`. Raises a usage error for a weight that is no number."""
    from ..training.data.opening import Ingredient

    name, equals, amount = word.rpartition("=") if "=" in word else (word, "", "")
    folder, _, part = name.rpartition(":")
    if part not in ("text", "dialogue", "instruction"):
        folder, part = name, "all"
    try:
        weight = float(amount) if equals else None
    except ValueError as error:
        raise typer.BadParameter(f"{word!r}: `{amount}` is no weight", param_hint="SET") from error
    return Ingredient(folder, part, weight, texts, objective)  # type: ignore[arg-type]


def lines(facts: list[dict[str, Any]]) -> list[str]:
    """A small table."""
    width = max(len(f"{fact['set']}:{fact['part']}") for fact in facts)
    out = []
    for fact in facts:
        epochs = "" if fact["epochs"] is None else f", {fact['epochs']:g} epochs"
        out.append(
            f"{fact['set']}:{fact['part']}".ljust(width) + f"  {fact['share']:6.1%} of {fact['rows']:,} rows{epochs}"
        )
    return out
