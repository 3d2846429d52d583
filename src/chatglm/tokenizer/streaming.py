"""StreamDecoder: ids → text as they come, never half a character.

Characters outside the vocabulary are spelled as UTF-8 bytes, one id a byte; such bytes are held until the character is
whole or cannot become one. Each byte that belongs to no character gives U+FFFD, as SentencePiece has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .vocabulary import BLANK

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Decode one answer piece by piece: `push` ids, then `finish`. The pieces join to `tokenizer.decode` of all ids.

    The work of a push does not depend on what came before.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep_first_blank: bool = False) -> None:
        """keep_first_blank: the first piece's blank is text, as where a grammar counted it."""
        self._tokenizer = tokenizer
        self._bytes = b""  # at most three: the beginning of a character
        self._is_at_start = not keep_first_blank

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that is certain after one or several more ids."""
        out: list[str] = []
        for token in (ids,) if isinstance(ids, int) else ids:
            found = self._tokenizer.piece_text(token)
            if isinstance(found, int):
                self._bytes += bytes([found])
                text = self._whole_characters()
            else:
                text = self._broken_bytes()  # anything else ends a run of bytes
                if found:
                    if self._is_at_start and not text:
                        found = found.removeprefix(BLANK)  # SentencePiece puts a blank before the first word
                    text += found.replace(BLANK, " ")
            if text:
                self._is_at_start = False
                out.append(text)
        return "".join(out)

    def finish(self) -> str:
        """What is still held, once no more ids come."""
        return self._broken_bytes()

    def _whole_characters(self) -> str:
        """Take what is decided from the held bytes: whole characters, and bytes that begin none."""
        out = ""
        while self._bytes:
            try:
                out += self._bytes.decode()
                self._bytes = b""
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                out += REPLACEMENT
                self._bytes = self._bytes[1:]
        return out

    def _broken_bytes(self) -> str:
        broken, self._bytes = REPLACEMENT * len(self._bytes), b""
        return broken
