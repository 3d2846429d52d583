"""StreamDecoder: whole characters only, pieces that join to the full decode, constant work per id."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm.tokenizer import StreamDecoder, Tokenizer


def random_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of every kind: words, layout, bytes that may or may not make characters, special, image, no piece."""
    layout, first_byte = tokenizer.piece_to_id("<|tab|>"), tokenizer.piece_to_id("<0x00>")
    characters = st.characters(exclude_categories=["Cs"]).map(
        lambda character: [first_byte + byte for byte in character.encode()]
    )
    one = (
        st.integers(0, tokenizer.vocab_size + 300)
        | st.integers(first_byte, first_byte + 255)
        | st.integers(layout, layout + 79)
        | st.sampled_from([tokenizer.eop_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.offset + 4])
        | st.just(tokenizer.offset + 5)
        | st.integers(-5, 5)
    )
    return st.lists(characters | one.map(lambda token: [token]), max_size=25).map(
        lambda runs: [token for run in runs for token in run]
    )


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@pytest.mark.parametrize("name", ["tokenizer", "first_release", "reduced"])
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_streamed_pieces_join_to_the_full_decode(
    request: pytest.FixtureRequest, name: str, data: st.DataObject
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = data.draw(random_ids(tokenizer))
    full = tokenizer.decode(ids)
    assert "".join(streamed(tokenizer, ids)) == full
    cut = data.draw(st.integers(0, len(ids)))
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(ids[:cut]) + decoder.push(iter(ids[cut:])) + decoder.finish() == full


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_full_decode_equals_sentencepiece_on_ids_with_pieces(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = [token for token in data.draw(random_ids(tokenizer)) if 0 < token < tokenizer.vocab_size]
    pieces = [tokenizer.id_to_piece(token) for token in ids]
    assert tokenizer.decode(ids) == tokenizer.decode_pieces(pieces)


@settings(deadline=None, max_examples=200)
@given(text=st.text("你好龘𠮷😀👋é ab\n", max_size=20))
def test_a_stream_of_real_text_never_shows_a_broken_character(first_release: Tokenizer, text: str) -> None:
    assert not any("\ufffd" in piece for piece in streamed(first_release, first_release.encode(text)))


def test_a_character_in_bytes_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in "龘".encode()]
    assert streamed(tokenizer, ids) == ["", "", "龘", ""]


def test_each_byte_of_a_broken_character_gives_one_replacement(tokenizer: Tokenizer) -> None:
    byte = {value: tokenizer.piece_to_id(f"<0x{value:02X}>") for value in range(256)}
    hello = tokenizer.piece_to_id("你好")
    assert streamed(tokenizer, [byte[0xE4], byte[0xBD], hello]) == ["", "", "\ufffd\ufffd你好", ""]
    assert streamed(tokenizer, [byte[0xE4], byte[0x41]]) == ["", "\ufffdA", ""]
    assert streamed(tokenizer, [byte[0xFF], byte[0xF0], byte[0x9F]]) == ["\ufffd", "", "", "\ufffd\ufffd"]
    assert streamed(tokenizer, [byte[0xE4], tokenizer.eop_id, byte[0xBD]]) == ["", "\ufffd", "\ufffd", ""]


def test_only_the_very_first_blank_is_left_out(tokenizer: Tokenizer) -> None:
    word, blank = tokenizer.piece_to_id("▁world"), 5
    assert streamed(tokenizer, [blank, word, word, blank]) == ["", "world", " world", " ", ""]
    assert streamed(tokenizer, [tokenizer.pad_id, word]) == ["", "world", ""]
    assert tokenizer.decode([4, word]) == "\n world"
    assert tokenizer.decode([tokenizer.piece_to_id("<|blank_2|>"), word]) == "   world"


def test_a_push_looks_only_at_its_own_ids(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    look_up = Tokenizer.piece_text
    monkeypatch.setattr(Tokenizer, "piece_text", lambda self, token: seen.append(token) or look_up(self, token))
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("龘好 world\n" * 50)
    for token in ids:
        decoder.push(token)
        assert len(decoder._bytes) <= 3
    assert seen == ids
