"""A quality report as a table: for a terminal, or in Markdown for the documentation."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

COLUMNS = (
    "weights",
    "size",
    "perplexity",
    "change",
    "bits/byte",
    "divergence",
    "equal next",
    "equal answers",
    "first difference",
)


def rows_of(report: dict[str, Any]) -> list[list[str]]:
    """Header and one row for each form, as text; the change of each file comes last."""
    names = [str(file["file"]) for file in report["files"]]
    table = [[*COLUMNS, *names]]
    for row in report["rows"]:
        table.append(
            [
                row["form"],
                f"{row['weight_bytes'] / 1e6:,.1f} MB",
                f"{row['perplexity']:.3f}",
                percent(row["perplexity_change"]),
                f"{row['bits_per_byte']:.4f}",
                f"{row['divergence'] * 1000:.2f}",
                f"{row['equal_next_tokens']:.1%}",
                f"{row['equal_answers']:.1%}",
                f"{row['first_difference']:.0f}",
                *(percent(row["files"][name]["perplexity_change"]) for name in names),
            ]
        )
    return table


def percent(change: float) -> str:
    """`+1.23%`, and never `-0.00%`."""
    shown = f"{change:+.2%}"
    return shown.replace("-0.00%", "+0.00%")


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, numbers are right-aligned."""
    header, *rows = table
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def as_text(table: Sequence[Sequence[str]]) -> str:
    """Columns padded with blanks."""
    widths = [max(map(width, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        first = row[0] + " " * (widths[0] - width(row[0]))
        rest = (" " * (wide - width(cell)) + cell for cell, wide in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([first, *rest]))
    return "\n".join(lines)


def width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
