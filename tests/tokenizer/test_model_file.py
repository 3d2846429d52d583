"""A missing, damaged or foreign tokenizer file is one error that names the file, its size and the cure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm.errors import TokenizerError
from chatglm.tokenizer import Tokenizer, complete, read_model_file
from chatglm.tokenizer.model_file import respell

Place = Callable[[bytes], Path]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Writes bytes as a tokenizer file."""

    def write(data: bytes) -> Path:
        path = tmp_path / "ice_text.model"
        path.write_bytes(data)
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_file(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n  cure: " in text
    assert text.count("\n") <= 4
    return text


def test_official_files_are_known_by_name(tokenizer_file: Path, first_release_file: Path, reduced_file: Path) -> None:
    slim, first, small = map(read_model_file, (tokenizer_file, first_release_file, reduced_file))
    assert (slim.release, first.release, small.release) == (
        "slim, 2023-04-06 and later", "first release, until 2023-04-05", None,
    )  # fmt: skip
    assert (slim.stored_pieces, first.stored_pieces, small.stored_pieces) == (130_344, 130_000, 544)
    assert (slim.is_first_release, first.is_first_release, small.is_first_release) == (False, True, False)
    assert first.sha256 == hashlib.sha256(first_release_file.read_bytes()).hexdigest()


def test_completing_the_first_release_gives_the_later_official_file(
    tokenizer_file: Path, first_release_file: Path
) -> None:
    assert complete(first_release_file.read_bytes()) == tokenizer_file.read_bytes()


def test_completed_pieces_are_those_of_the_later_file(tokenizer_file: Path, first_release_file: Path) -> None:
    slim, first = read_model_file(tokenizer_file), read_model_file(first_release_file)
    assert (first.pieces, first.kinds, first.proto) == (slim.pieces, slim.kinds, slim.proto)


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "ice_text.model")


def test_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "ice_text.model").mkdir()
    assert "not readable" in refusal(tmp_path / "ice_text.model")


def test_git_lfs_pointer_is_recognised_with_both_sizes(place: Place) -> None:
    pointer = (
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e\nsize 2706249\n"
    )
    text = refusal(place(pointer.encode()))
    assert "is a Git-LFS pointer (132 bytes) that stands for 2,706,249 bytes" in text
    assert "git lfs pull" in text and "chatglm pull" in text
    assert "is a Git-LFS pointer (31 bytes), not the tokenizer" in refusal(place(b"version https://git-lfs.github."))


def test_empty_file_is_named(place: Place) -> None:
    assert "is empty (0 bytes)" in refusal(place(b""))


@pytest.mark.parametrize("data", [b"<html>404 Not Found</html>", bytes(500), b"\x12\x00\x1a\x00", b"PK\x03\x04" * 9])
def test_other_kinds_of_file_are_recognised(place: Place, data: bytes) -> None:
    assert f"is not a SentencePiece file ({len(data)} bytes" in refusal(place(data))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(
    reduced_file: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = reduced_file.read_bytes()
    cut = data.draw(st.integers(0, 9_500) | st.integers(0, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut") / "ice_text.model"
    path.write_bytes(whole[:cut])
    refusal(path)


def test_truncated_file_tells_bytes_and_pieces_read(place: Place, tokenizer_file: Path) -> None:
    text = refusal(place(tokenizer_file.read_bytes()[:1_000_000]))
    assert "is truncated or damaged: it breaks off at byte 999,9" in text
    assert "1,000,000 bytes, 52," in text and "pieces could be read" in text


def test_file_cut_exactly_between_two_pieces_is_truncated_and_not_a_first_release(
    place: Place, first_release_file: Path
) -> None:
    whole = first_release_file.read_bytes()
    between = whole.index(b"\n\x0e\n\x05", 1_000_000)
    assert "its end is missing" in refusal(place(whole[:between]))


@pytest.mark.parametrize("name", ["tokenizer_file", "first_release_file"])
def test_a_flipped_bit_in_an_official_file_is_found(place: Place, request: pytest.FixtureRequest, name: str) -> None:
    data = bytearray(request.getfixturevalue(name).read_bytes())
    data[2_600_000] ^= 1  # inside the normaliser's table, which loads just as well
    text = refusal(place(bytes(data)))
    assert f"is damaged: {len(data):,} bytes" in text
    assert "its sha256 is" in text and ("not 5e974d9a" in text or "not 99871e0c" in text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\x0a\x05<unk>", b"\x0a\x05<u\xffk>"),  # not UTF-8
        (b"\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02", b"\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x09"),  # no such kind
        (b"\x0a\x05<unk>", b"\x0a\x7f<unk>"),  # longer than its piece
    ],
)
def test_an_unreadable_piece_is_named_by_its_number(place: Place, reduced_file: Path, old: bytes, new: bytes) -> None:
    data = reduced_file.read_bytes()
    assert old in data
    text = refusal(place(data.replace(old, new, 1)))
    assert "is truncated or damaged: piece 0 cannot be read; 246,873 bytes, 0 pieces" in text


def test_a_file_that_sentencepiece_refuses_is_named(place: Place, reduced_file: Path) -> None:
    doubled = respell(reduced_file.read_bytes(), {60: "same", 61: "same"})
    text = refusal(place(doubled))
    assert "is damaged" in text and "544 pieces" in text and "SentencePiece says" in text


def test_a_foreign_model_is_told_by_the_pieces_it_lacks(place: Place, reduced_file: Path) -> None:
    reduced = read_model_file(reduced_file)
    no_sop = respell(reduced.proto, {reduced.pieces.index("<sop>"): "<bos>"})
    assert "is the SentencePiece file of another model: 246,873 bytes, 544 pieces, without `<sop>`" in refusal(
        place(no_sop)
    )
    foreign = respell(reduced.proto, {index: f"piece{index}" for index in range(4, 544)})
    text = refusal(place(foreign))
    assert "544 pieces, without `<n>`, `[MASK]`, `[gMASK]`, `[sMASK]` and 341 more" in text


def test_a_special_piece_that_text_could_become_is_refused(place: Place, reduced_file: Path) -> None:
    control = b"<sop>\x15\x00\x00\x00\x00\x18\x03"
    data = reduced_file.read_bytes().replace(control, control[:-1] + b"\x04")
    text = refusal(place(data))
    assert "piece `<sop>` is user_defined, it must be control" in text


def test_a_kind_left_out_means_an_ordinary_piece(place: Place, reduced_file: Path) -> None:
    data = reduced_file.read_bytes()
    start = data.index(b"\n\x0c\n\x03\xe2\x96\x81\x15")  # piece 5: a blank, kind 1 written out
    shorter = data[:start] + b"\n\x0a" + data[start + 2 : start + 12] + data[start + 14 :]
    assert Tokenizer.from_file(place(shorter)).encode("a b") == Tokenizer.from_file(reduced_file).encode("a b")
