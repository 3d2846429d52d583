"""Numbers as people read them."""

from __future__ import annotations


def human_bytes(count: int) -> str:
    """Decimal units, as disks and download pages count: 12.35 GB."""
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"


def plural(count: int, noun: str) -> str:
    """`1 file`, `3 files`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def format_said(bits: int, group_size: int, embedding_bits: int) -> str:
    """`INT4, groups of 64, embedding and head INT8`."""
    packing = f"groups of {group_size}" if group_size else "one scale a row (the original's packing)"
    tables = f"embedding and head INT{embedding_bits}" if embedding_bits else "embedding and head as floats"
    return f"INT{bits}, {packing}, {tables}"
