"""Tokenizer: text ↔ ids. SentencePiece does the work; this adds layout pieces, eras and safety.

Native encoding differs from the original's in one point: nothing that a person types is ever taken for a special
piece or for one of the original's spellings of layout (`<n>`, `<|tab|>`, `<|blank_3|>`). See docs/tokenizer.md.
Source: spec/chatglm-6b.md §5.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece

from ..config import IMAGE_TOKENS
from ..errors import TokenizerError
from .fitness import check_fitness
from .model_file import TOKENIZER_FILE, ModelFile, read_model_file, respell
from .original_pieces import OriginalPieces
from .streaming import StreamDecoder
from .vocabulary import EOP, GMASK, LONGEST_BLANK, MASK, PAD, SMASK, SOP, UNKNOWN, Kind, symbols

if TYPE_CHECKING:
    from ..config import ModelConfig

_LAYOUT = re.compile(r"[\n\t]| {2,}")
_SURROGATES = re.compile("[\ud800-\udfff]")

# Layout pieces reach SentencePiece under a spelling that no text can hold: two characters, the first of which is a
# control character that the normaliser deletes. In the text itself it is first replaced by the next one, which the
# normaliser deletes just as well.
_MARK, _OTHER_MARK = "\x01", "\x02"
_FIRST_SYMBOL = 0x21


_recent: dict[tuple[int, int], Tokenizer] = {}
"""The last one that was made, by its file (which it holds) and image tokens: verifying and loading both ask for it."""


class Tokenizer:
    """The text tokenizer of one checkpoint. Safe to use from several threads.

    pieces       entries of the SentencePiece model, appended ones counted (130,344 in both official forms)
    offset       image tokens in front: 20,000 in the pre-slim era, else 0
    vocab_size   pieces + offset; the model's embedding may have more rows
    Special ids (`gmask_id`, `sop_id`, …) are found by piece.
    """

    def __init__(self, file: ModelFile, *, image_tokens: int = 0) -> None:
        self.file = file
        self.path = file.path
        self.pieces = len(file.pieces)
        self.offset = IMAGE_TOKENS if file.is_first_release else image_tokens
        self.vocab_size = self.pieces + self.offset
        self._ids = {piece: index + self.offset for index, piece in enumerate(file.pieces)}
        layout = symbols()
        marks = {piece: _MARK + chr(_FIRST_SYMBOL + index) for index, piece in enumerate(layout)}
        indices = {piece: self._ids[piece] - self.offset for piece in layout}
        self._marks = {text: marks[piece] for piece, text in layout.items()}
        self._texts = {indices[piece]: text for piece, text in layout.items()}
        self._model = load_proto(respell(file.proto, {indices[piece]: mark for piece, mark in marks.items()}), file)
        self.mask_id, self.gmask_id, self.smask_id = self._ids[MASK], self._ids[GMASK], self._ids[SMASK]
        self.sop_id, self.eop_id = self._ids[SOP], self._ids[EOP]
        self.pad_id, self.unk_id = self._ids[PAD], self._ids[UNKNOWN]

    @classmethod
    def from_file(cls, path: str | Path, *, config: ModelConfig | None = None, image_tokens: int = 0) -> Tokenizer:
        """From an `ice_text.model` of either form; checked against `config` when given.

        image_tokens   added to every id: 0, or 20,000 for a later file used with pre-slim weights; a first-release
                       file always has 20,000
        Raises TokenizerError naming the file, its size and pieces, and the cure.
        """
        file = read_model_file(path)
        made = _recent.get((id(file), image_tokens))
        tokenizer = cls(file, image_tokens=image_tokens) if made is None or type(made) is not cls else made
        _recent.clear()
        _recent[id(file), image_tokens] = tokenizer
        if config is not None:
            tokenizer.check_against(config)
        return tokenizer

    @classmethod
    def from_folder(cls, folder: str | Path, *, config: ModelConfig | None = None) -> Tokenizer:
        """From a checkpoint folder: its `ice_text.model`, and `num_image_tokens` of tokenizer_config.json."""
        folder = Path(folder)
        return cls.from_file(folder / TOKENIZER_FILE, config=config, image_tokens=_stored_image_tokens(folder))

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, {self.pieces:,} pieces, ids from {self.offset:,})"

    def __len__(self) -> int:
        return self.vocab_size

    def check_against(self, config: ModelConfig) -> None:
        """Raise TokenizerError, with both values, when the file and the config do not belong together."""
        check_fitness(self, config)

    # Text → ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ids, whatever the text spells.

        Equal to the original's ids for every text that spells no special piece and no layout piece.
        """
        ids: list[int] = self._model.encode(self._marked(text))
        return [index + self.offset for index in ids] if self.offset else ids

    def encode_context(self, text: str) -> list[int]:
        """Ids of a text followed by `[gMASK]` and `<sop>`: what the model answers to."""
        return [*self.encode(text), self.gmask_id, self.sop_id]

    def _marked(self, text: str) -> str:
        text = _SURROGATES.sub("\ufffd", text).replace(_MARK, _OTHER_MARK)
        return _LAYOUT.sub(self._mark, text)

    def _mark(self, match: re.Match[str]) -> str:
        found = match[0]
        if found in self._marks:
            return self._marks[found]
        longest, rest = divmod(len(found), LONGEST_BLANK)  # more than 80 blanks
        tail = self._marks[" " * rest] if rest > 1 else " " * rest
        return self._marks[" " * LONGEST_BLANK] * longest + tail

    # Ids → text

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Special ids and ids without a piece give nothing; a broken character gives U+FFFD per byte."""
        decoder = StreamDecoder(self)
        return decoder.push(ids) + decoder.finish()

    def piece_text(self, token: int) -> str | int | None:
        """What an id stands for: text (`▁` for a blank), a byte's value, or None where it gives nothing."""
        index = token - self.offset
        if not 0 <= index < self.pieces:
            return None
        if index in self._texts:
            return self._texts[index]
        kind, piece = self.file.kinds[index], self.file.pieces[index]
        if kind == Kind.BYTE:
            return int(piece[1:-1], 16)
        return None if kind in (Kind.CONTROL, Kind.UNKNOWN) else piece

    # Pieces

    def id_to_piece(self, token: int) -> str:
        """The piece of an id; `<image_7>` for an image token. Raises TokenizerError for an id without a piece."""
        if 0 <= token < self.offset:
            return f"<image_{token}>"
        if self.has_no_piece(token):
            raise TokenizerError(f"id {token} has no piece; {self.path} has {self.offset} to {self.vocab_size - 1}")
        return self.file.pieces[token - self.offset]

    def piece_to_id(self, piece: str) -> int:
        """The id of a piece; `unk_id` when there is none, as SentencePiece has it."""
        return self._ids.get(piece, self.unk_id)

    def has_no_piece(self, token: int) -> bool:
        """Whether an embedding row belongs to no piece: image tokens, and the rows beyond the last piece."""
        return not self.offset <= token < self.vocab_size

    def is_special(self, token: int) -> bool:
        """Whether an id is a special one (`<unk>`, `<pad>`, `[gMASK]`, `<sop>`, …): no text encodes to it."""
        return not self.has_no_piece(token) and self.file.kinds[token - self.offset] in (
            Kind.CONTROL,
            Kind.UNKNOWN,
        )

    # The original's own rules, for the compatible tokenizer

    @cached_property
    def original(self) -> OriginalPieces:
        """The original's rules, where user text may spell layout pieces. Loaded on first use."""
        return OriginalPieces(load_proto(self.file.proto, self.file))

    def encode_as_pieces(self, text: str) -> list[str]:
        """Pieces of a text by the original's rules, where `<n>` typed by a user is a newline. No special pieces."""
        return self.original.encode(text)

    def decode_pieces(self, pieces: Iterable[str]) -> str:
        """Text of pieces by the original's rules (v1.1.0, before its clean-up of spaces); `<unk>` gives ` ⁇ `."""
        return self.original.decode(pieces)


def load_proto(proto: bytes, file: ModelFile) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece processor, or TokenizerError naming the file."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise TokenizerError(
            f"{file.path} is damaged: {file.size:,} bytes, {file.stored_pieces:,} pieces; SentencePiece says: {error}",
            cure="copy the file again from where the checkpoint came from",
        ) from error
    return model


def _stored_image_tokens(folder: Path) -> int:
    path = folder / "tokenizer_config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")).get("num_image_tokens", 0)
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, AttributeError) as error:
        raise TokenizerError(f"{path}: not readable as a JSON object ({error})", cure="fetch it again") from error
    if stored not in (0, IMAGE_TOKENS):
        raise TokenizerError(f"{path}: `num_image_tokens` is {stored!r}; it must be 0 or {IMAGE_TOKENS}")
    return int(stored)
