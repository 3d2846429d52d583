"""The pieces that ChatGLM gives a meaning to, by name. Ids are never assumed: they are looked up in the file.

Order and kinds: spec/chatglm-6b.md §5.1. The first release (130,000 pieces) lacks the last 344; the original appended
them while it ran, in the order of `appended_pieces`.
"""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """What SentencePiece does with a piece (`ModelProto.SentencePiece.Type`)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


UNKNOWN = "<unk>"
PAD = "<pad>"
MASK, GMASK, SMASK, SOP, EOP = "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"
SPECIAL_PIECES = (MASK, GMASK, SMASK, "<unused_0>", SOP, EOP, "<ENC>", "<dBLOCK>")

NEWLINE, TAB = "<n>", "<|tab|>"
LONGEST_BLANK = 80
"""Runs of 2 to 80 blanks have a piece of their own; a single blank is SentencePiece's `▁`."""

BLANK = "▁"


def blank_piece(length: int) -> str:
    """The piece for a run of `length` blanks (2 to 80)."""
    return f"<|blank_{length}|>"


def byte_piece(value: int) -> str:
    """The piece for one byte of a character that no other piece covers."""
    return f"<0x{value:02X}>"


def symbols() -> dict[str, str]:
    """Piece → text of the 81 pieces that stand for layout: newline, tab, runs of blanks."""
    runs = {blank_piece(length): " " * length for length in range(2, LONGEST_BLANK + 1)}
    return {NEWLINE: "\n", TAB: "\t", **runs}


def appended_pieces() -> list[tuple[str, Kind]]:
    """The 344 pieces that the first release lacks, in id order: 8 special, tab, 79 blanks, 256 bytes."""
    layout = [piece for piece in symbols() if piece != NEWLINE]  # `<n>` was trained into the file
    return [
        *((piece, Kind.CONTROL) for piece in SPECIAL_PIECES),
        *((piece, Kind.USER_DEFINED) for piece in layout),
        *((byte_piece(value), Kind.BYTE) for value in range(256)),
    ]


def required_pieces() -> dict[str, Kind]:
    """Every piece that must be in a complete file, with its kind.

    The kinds matter: SentencePiece never makes a control piece out of text, which keeps users from typing `<sop>`.
    """
    base = {UNKNOWN: Kind.UNKNOWN, PAD: Kind.CONTROL, NEWLINE: Kind.USER_DEFINED}
    return base | dict(appended_pieces())
