"""ice_text.model: reading, checking and completing the SentencePiece file before SentencePiece sees it.

SentencePiece's own errors name neither the file nor the cure, and it loads a damaged or foreign file when the bytes
happen to parse. So the file is walked here first. The first release is completed to the form of the later ones.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import TokenizerError
from .protobuf import Field, WireError, bytes_field, number_field, scan
from .vocabulary import NEWLINE, Kind, appended_pieces, required_pieces

TOKENIZER_FILE = "ice_text.model"

# Fields of SentencePiece's ModelProto and of the messages inside.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_TEXT_KEY, _SCORE_KEY = _PIECE_TEXT << 3 | 2, _PIECE_SCORE << 3 | 5
_BYTE_FALLBACK = 35

_KINDS = {kind.value: kind for kind in Kind}
_LFS_POINTER = b"version https://git-lfs"
_CURE = "copy the file again from where the checkpoint came from, or fetch it with `chatglm pull`"
_FOREIGN_CURE = "use the ice_text.model of a ChatGLM-6B checkpoint"


@dataclass(frozen=True)
class Release:
    """A released tokenizer file. `size` in bytes."""

    name: str
    size: int
    sha256: str


KNOWN_RELEASES = (
    Release(
        name="slim, 2023-04-06 and later",
        size=2_706_249,
        sha256="5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e",
    ),
    Release(
        name="first release, until 2023-04-05",
        size=2_699_926,
        sha256="99871e0c85db81ad7af1028854fd091cd5778c8414ae9d94bbbc10d02c831c21",
    ),
)


@dataclass(frozen=True)
class ModelFile:
    """A checked tokenizer file.

    size, sha256       of the file as stored
    stored_pieces      pieces in the file; `pieces` has 344 more for the first release
    is_first_release   the special, blank and byte pieces were not in the file and have been appended
    proto              the complete SentencePiece model, byte fallback on
    pieces, kinds      by SentencePiece id (no image tokens counted)
    """

    path: Path
    size: int
    sha256: str
    stored_pieces: int
    is_first_release: bool
    proto: bytes = field(repr=False)
    pieces: list[str] = field(repr=False)
    kinds: list[Kind] = field(repr=False)

    @property
    def release(self) -> str | None:
        """Name of the official release that this file is byte for byte, or None."""
        return next((known.name for known in KNOWN_RELEASES if known.sha256 == self.sha256), None)


def read_model_file(path: str | Path) -> ModelFile:
    """Read and check a tokenizer file, either form.

    Raises TokenizerError for a file that is missing, a Git-LFS pointer, truncated, damaged, or of another model;
    the message has the file, its size and how many pieces could be read.
    """
    path = Path(path)
    try:
        state = path.stat()
    except OSError:
        return _read_model_file(path, 0, 0)  # says what is wrong with it
    return _read_model_file(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4)
def _read_model_file(path: Path, _modified_ns: int, _size: int) -> ModelFile:
    """Read once while the file stays as it is: verifying and loading both ask for it."""
    raw = _read(path)
    proto, names, kinds = raw, *_pieces(path, raw)
    stored, sha256 = len(names), hashlib.sha256(raw).hexdigest()
    for release in KNOWN_RELEASES:
        if len(raw) == release.size and sha256 != release.sha256:
            raise TokenizerError(
                f"{path} is damaged: {len(raw):,} bytes, {stored:,} pieces as the released file ({release.name}), "
                f"but its sha256 is {sha256[:16]}…, not {release.sha256[:16]}…",
                cure=_CURE,
            )
    is_first_release = _lacks_appended_pieces(names, kinds)
    if is_first_release:
        proto = complete(raw)
        names = names + [name for name, _ in appended_pieces()]
        kinds = kinds + [kind for _, kind in appended_pieces()]
    _check_pieces(path, len(raw), names, kinds)
    return ModelFile(path, len(raw), sha256, stored, is_first_release, proto, names, kinds)


def complete(raw: bytes) -> bytes:
    """A first-release file in the later form: 344 pieces appended, byte fallback on.

    The official first-release file becomes the official later one, byte for byte.
    """
    appended = b"".join(_piece_field(text.encode(), kind) for text, kind in appended_pieces())
    fields = scan(raw, 0, len(raw))
    last_piece = max(entry.end for entry in fields if entry.number == _PIECE)
    out = [raw[:last_piece], appended]
    for entry in fields:
        if entry.start >= last_piece:
            is_trainer = entry.number == _TRAINER
            out.append(_with_byte_fallback(raw, entry) if is_trainer else raw[entry.start : entry.end])
    return b"".join(out)


def respell(proto: bytes, spellings: Mapping[int, str]) -> bytes:
    """The same model with the pieces of some ids under another text. Ids and kinds stay; the score becomes 0."""
    entries = [entry for entry in scan(proto, 0, len(proto)) if entry.number == _PIECE]
    out, copied = [], 0
    for index in sorted(spellings):
        entry = entries[index]
        _, kind = _piece(proto, entry)
        out += [proto[copied : entry.start], _piece_field(spellings[index].encode(), kind)]
        copied = entry.end
    return b"".join([*out, proto[copied:]])


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise TokenizerError(f"{path}: no such file; it holds the tokenizer", cure=_CURE) from error
    except OSError as error:
        raise TokenizerError(f"{path}: not readable ({error.strerror})", cure=_CURE) from error
    if raw.startswith(_LFS_POINTER):
        size = re.search(rb"^size (\d+)$", raw, re.MULTILINE)
        promised = f" that stands for {int(size[1]):,} bytes" if size else ""
        raise TokenizerError(
            f"{path} is a Git-LFS pointer ({len(raw)} bytes){promised}, not the tokenizer",
            cure=f"run `git lfs pull` in {path.parent}, or fetch the checkpoint with `chatglm pull`",
        )
    if not raw:
        raise TokenizerError(f"{path} is empty (0 bytes)", cure=_CURE)
    return raw


def _pieces(path: Path, raw: bytes) -> tuple[list[str], list[Kind]]:
    """Texts and kinds of all pieces. Raises TokenizerError where the file stops making sense."""
    try:
        fields = scan(raw, 0, len(raw))
    except WireError as error:
        count = sum(entry.number == _PIECE for entry in error.fields)
        if not count:
            raise TokenizerError(f"{path} is not a SentencePiece file ({len(raw):,} bytes)", cure=_CURE) from None
        raise _damaged(path, raw, count, f"it breaks off at byte {error.offset:,}") from None
    names: list[str] = []
    kinds: list[Kind] = []
    try:
        for entry in fields:
            if entry.number == _PIECE:
                text, kind = _piece(raw, entry)
                names.append(text.decode())
                kinds.append(kind)
    except (WireError, UnicodeDecodeError, KeyError):
        raise _damaged(path, raw, len(names), f"piece {len(names):,} cannot be read") from None
    numbers = {entry.number for entry in fields}
    if not names:
        raise TokenizerError(f"{path} is not a SentencePiece file ({len(raw):,} bytes, no pieces)", cure=_CURE)
    if not {_TRAINER, _NORMALIZER} <= numbers:  # cut exactly between two fields
        raise _damaged(path, raw, len(names), "its end is missing")
    return names, kinds


def _damaged(path: Path, raw: bytes, count: int, what: str) -> TokenizerError:
    return TokenizerError(
        f"{path} is truncated or damaged: {what}; {len(raw):,} bytes, {count:,} pieces could be read",
        cure=_CURE,
    )


def _piece(data: bytes, entry: Field) -> tuple[bytes, Kind]:
    """Text and kind of a piece. Nearly all are a short text, a score and no more: those are read in place."""
    start, end = entry.value, entry.end
    text_end = start + 2 + data[start + 1] if end - start > 2 else 0
    if text_end + 5 == end and data[start] == _TEXT_KEY and data[start + 1] < 0x80 and data[text_end] == _SCORE_KEY:
        return data[start + 2 : text_end], Kind.NORMAL
    text, kind = b"", Kind.NORMAL
    for part in scan(data, entry.value, entry.end):
        if part.number == _PIECE_TEXT:
            text = data[part.value : part.end]
        elif part.number == _PIECE_KIND:
            kind = _KINDS[data[part.value]]
    return text, kind


def _piece_field(text: bytes, kind: Kind) -> bytes:
    """A piece with score 0, as the special and layout pieces have it."""
    no_score = bytes([_PIECE_SCORE << 3 | 5]) + bytes(4)
    return bytes_field(_PIECE, bytes_field(_PIECE_TEXT, text) + no_score + number_field(_PIECE_KIND, kind))


def _with_byte_fallback(raw: bytes, trainer: Field) -> bytes:
    """The trainer's message with byte fallback on, at its place in the order of numbers, where serialisers put it."""
    parts = [part for part in scan(raw, trainer.value, trainer.end) if part.number != _BYTE_FALLBACK]
    before = b"".join(raw[part.start : part.end] for part in parts if part.number < _BYTE_FALLBACK)
    behind = b"".join(raw[part.start : part.end] for part in parts if part.number > _BYTE_FALLBACK)
    return bytes_field(_TRAINER, before + number_field(_BYTE_FALLBACK, 1) + behind)


def _lacks_appended_pieces(names: list[str], kinds: list[Kind]) -> bool:
    """Whether this is a first-release file: `<n>` is there as a symbol, and none of the 344 later pieces is."""
    has_newline = any(name == NEWLINE and kind == Kind.USER_DEFINED for name, kind in zip(names, kinds, strict=True))
    return has_newline and {name for name, _ in appended_pieces()}.isdisjoint(names)


def _check_pieces(path: Path, size: int, names: list[str], kinds: list[Kind]) -> None:
    found = dict(zip(names, kinds, strict=True))
    missing = [name for name in required_pieces() if name not in found]
    if missing:
        shown = ", ".join(f"`{name}`" for name in missing[:4])
        more = f" and {len(missing) - 4} more" if missing[4:] else ""
        raise TokenizerError(
            f"{path} is the SentencePiece file of another model: {size:,} bytes, {len(names):,} pieces, "
            f"without {shown}{more}",
            cure=_FOREIGN_CURE,
        )
    for name, kind in required_pieces().items():
        if found[name] != kind:
            raise TokenizerError(
                f"{path} ({size:,} bytes, {len(names):,} pieces): piece `{name}` is {found[name].name.lower()}, "
                f"it must be {kind.name.lower()}",
                cure=_FOREIGN_CURE,
            )
