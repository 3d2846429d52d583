"""The original tokenizer's text ↔ pieces, for the tokenizer under transformers' names.

Here a text that spells `<n>`, `<|tab|>` or `<|blank_3|>` means the layout piece, as in the original; native encoding
(`Tokenizer.encode`) keeps such a text as it is. Special strings (`<sop>`, `[MASK]`) are cut out by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import sentencepiece

from .vocabulary import LONGEST_BLANK, NEWLINE, TAB, blank_piece

_BLANK_PIECE = re.compile(r"<\|blank_([2-9]|[1-7][0-9]|80)\|>")
_BLANKS = re.compile(" {2,}")


def spell_layout(text: str) -> str:
    """Newlines, tabs and runs of blanks as the pieces' own spelling; longest runs first, a single blank stays."""
    return _BLANKS.sub(_blank_pieces, text.replace("\n", NEWLINE).replace("\t", TAB))


def unspell_layout(text: str) -> str:
    """The reverse of `spell_layout`."""
    text = text.replace(NEWLINE, "\n").replace(TAB, "\t")
    return _BLANK_PIECE.sub(lambda match: " " * int(match[1]), text)


class OriginalPieces:
    """Text ↔ pieces by the original's rules, on a complete SentencePiece model under its own spellings."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor) -> None:
        self._model = model

    def encode(self, text: str) -> list[str]:
        """Pieces of a text."""
        pieces: list[str] = self._model.encode(spell_layout(text), out_type=str)
        return pieces

    def decode(self, pieces: Iterable[str]) -> str:
        """Text of pieces: bytes joined, control pieces dropped, `<unk>` as ` ⁇ `, layout restored."""
        return unspell_layout(self._model.decode_pieces(list(pieces)))


def _blank_pieces(run: re.Match[str]) -> str:
    longest, rest = divmod(len(run[0]), LONGEST_BLANK)
    tail = blank_piece(rest) if rest > 1 else " " * rest
    return blank_piece(LONGEST_BLANK) * longest + tail
