"""`chatglm data check`: everything that is wrong with a corpus."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .data_options import LayoutOptions, ReadingOptions
from .options import CommonOptions
from .progress import ProgressBar
from .units import plural


def check(
    inputs: Annotated[
        list[str], typer.Argument(help="Files, folders, archives; - is stdin", metavar="INPUT…", show_default=False)
    ],
    *,
    reading: ReadingOptions,
    layout: LayoutOptions,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="Evaluation data whose prompts must not be here (repeatable)", metavar="FILE"),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every problem, not the first five of a kind")] = False,
    common: CommonOptions,
) -> None:
    """Read texts, dialogues and preferences to the end and list what is wrong, with file and line.

    Ends with 1 where problems are more than --allow passes over. Preferences are checked for duplicates, contradictory
    pairs, cycles, ties, equal answers; --against finds prompts that leaked from an evaluation set.

    Try next: chatglm data prepare INPUT --out DIR
    """
    how = reading.reading()

    from ..training.data.checking import check as run
    from ..training.data.preparing import open_tokenizer
    from ..training.data.problems import SHOWN, Allowance

    allowance = Allowance.parse(reading.allow or ())
    with ProgressBar(common.terminal()) as progress:
        progress.say("Reading the tokenizer")
        found = run(
            inputs,
            how,
            tokenizer=open_tokenizer(layout.tokenizer_path()),
            layout=layout.layout(),
            form=reading.form,  # type: ignore[arg-type]
            against=against or (),
            progress=progress,
        )
    facts = found.as_dict()
    stopping = found.findings.stopping(allowance, found.records)
    if common.json:
        print(json.dumps({**facts, "passed": not stopping}, ensure_ascii=False))
    else:
        _tell(facts, [str(problem) for problem in (found.problems if all_ else found.findings.shown)])
        hidden = sum(max(0, count - SHOWN) for count in found.findings.counts.values())
        if hidden and not all_:
            common.terminal().note(f"{plural(hidden, 'more problem')}; --all lists them")
    if stopping:
        raise typer.Exit(1)


def _tell(facts: dict[str, Any], problems: list[str]) -> None:
    for problem in problems:
        print(problem)
    kinds = [("text", facts["texts"]), ("dialogue", facts["dialogues"])]
    parts = [plural(count, noun) for noun, count in kinds if count]
    judged = facts["preferences"]
    if judged:
        parts.append(f"{plural(judged['pairs'], 'pair')} on {plural(judged['prompts'], 'prompt')}")
    languages = ", ".join(f"{name} {count:,}" for name, count in sorted(facts["languages"].items()))
    print(
        f"{plural(facts['records'], 'record')}: {', '.join(parts) or 'nothing that can be used'} ({languages or '-'})"
    )
    if judged and judged["longer_wins"] is not None:
        print(f"The longer answer is preferred in {judged['longer_wins']:.1%} of the pairs of unequal length.")
    counts = facts["counts"]
    print(", ".join(f"{count:,} {kind}" for kind, count in counts.items()) if counts else "No problems.")
