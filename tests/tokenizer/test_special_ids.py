"""Special ids are found by piece, rows without a piece are known, and every id has one meaning."""

from __future__ import annotations

import pytest

from chatglm.errors import TokenizerError
from chatglm.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("name", "first", "pad", "rows"),
    [
        ("tokenizer", 130_000, 3, 130_528),
        ("first_release", 150_000, 20_003, 150_528),
        ("reduced", 200, 3, 544),
        ("embedded", 12_000, 3, 12_352),
    ],
)
def test_special_ids_are_found_by_piece(
    request: pytest.FixtureRequest, name: str, first: int, pad: int, rows: int
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    found = (tokenizer.mask_id, tokenizer.gmask_id, tokenizer.smask_id, tokenizer.sop_id, tokenizer.eop_id)
    assert found == (first, first + 1, first + 2, first + 4, first + 5)
    assert (tokenizer.pad_id, tokenizer.unk_id) == (pad, pad - 3)
    assert tokenizer.vocab_size == first + 344 <= rows
    special = [row for row in range(rows) if tokenizer.is_special(row)]
    assert special == [*range(pad - 3, pad + 1), *range(first, first + 8)]


def test_image_ids_and_rows_beyond_the_pieces_have_no_piece_and_decode_to_nothing(first_release: Tokenizer) -> None:
    no_piece = [row for row in range(150_528) if first_release.has_no_piece(row)]
    assert no_piece == [*range(20_000), *range(150_344, 150_528)]
    hello = first_release.encode("你好")
    assert first_release.decode([7, *hello, 150_400, 19_999, -1, 10**9]) == "你好"


def test_special_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.pad_id, tokenizer.pad_id, 5, 74874, tokenizer.gmask_id, tokenizer.sop_id, 5, 74874, 130005, 0]
    assert tokenizer.decode(ids) == "你好 你好"


def test_pieces_and_ids_map_to_each_other(tokenizer: Tokenizer, first_release: Tokenizer) -> None:
    assert tokenizer.id_to_piece(4) == "<n>"
    assert tokenizer.id_to_piece(tokenizer.piece_to_id("<0xE4>")) == "<0xE4>"
    assert tokenizer.piece_to_id("not a piece") == tokenizer.unk_id == 0
    assert first_release.id_to_piece(7) == "<image_7>"
    assert first_release.id_to_piece(94_874) == "你好"


def test_asking_for_the_piece_of_a_row_without_one_names_the_ids_there_are(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"id 130400 has no piece; .*ice_text\.model has 0 to 130343"):
        tokenizer.id_to_piece(130_400)


def test_repr_tells_file_pieces_and_era(first_release: Tokenizer) -> None:
    assert "ice_text.model', 130,344 pieces, ids from 20,000" in repr(first_release)
    assert len(first_release) == 150_344
