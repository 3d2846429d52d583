"""Text → ids: nothing a person types becomes a special or layout piece, and what was typed comes back."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm.tokenizer import Tokenizer

SPECIAL_STRINGS = [
    "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>",
    "<unk>", "<s>", "</s>", "<pad>",
]  # fmt: skip
LAYOUT_STRINGS = ["<n>", "<|tab|>", "<|blank_2|>", "<|blank_37|>", "<|blank_80|>", "<0x0A>", "<image_5>"]

# Characters that the file's normaliser leaves alone, and the strings that might be taken for pieces.
STABLE = st.sampled_from("abcXYZ019.,!?<>|[]{}()_-=/*\"'#é的一是不了人我在有你好龘𠮷😀ЖकאعÅ")
LAYOUT = st.sampled_from([" ", "  ", "   ", "\n", "\t", "\n\n    ", " " * 80, " " * 81, " " * 163])
TYPED = st.lists(STABLE | LAYOUT | st.sampled_from(SPECIAL_STRINGS + LAYOUT_STRINGS), max_size=30).map("".join)


def without_edge_blanks(text: str) -> str:
    """What the file keeps of a text: it drops one blank at an edge where the run has no piece for it."""
    if text.startswith(" ") and not text.startswith("  "):
        text = text[1:]
    trailing = len(text) - len(text.rstrip(" "))
    return text[:-1] if trailing % 80 == 1 else text


@pytest.mark.parametrize("text", SPECIAL_STRINGS + LAYOUT_STRINGS)
def test_text_that_spells_a_piece_stays_text(tokenizer: Tokenizer, text: str) -> None:
    for typed in (text, f"你好{text}再见", f"a {text} b", text * 3, f"\n{text}\t{text}"):
        ids = tokenizer.encode(typed)
        assert not any(tokenizer.is_special(token) for token in ids)
        assert tokenizer.decode(ids) == typed


def test_full_width_spelling_of_a_newline_piece_is_folded_but_stays_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a＜ｎ＞b")) == "a<n>b"


@settings(deadline=None, max_examples=300)
@given(typed=TYPED)
def test_typed_text_comes_back_and_holds_no_special_id(tokenizer: Tokenizer, typed: str) -> None:
    ids = tokenizer.encode(typed)
    assert not any(tokenizer.is_special(token) or tokenizer.has_no_piece(token) for token in ids)
    assert tokenizer.decode(ids) == without_edge_blanks(typed)


@settings(deadline=None, max_examples=200)
@given(typed=TYPED)
def test_small_and_first_release_files_keep_typed_text_too(
    reduced: Tokenizer, embedded: Tokenizer, first_release: Tokenizer, typed: str
) -> None:
    for tokenizer in (reduced, embedded, first_release):
        ids = tokenizer.encode(typed)
        assert not any(tokenizer.is_special(token) or tokenizer.has_no_piece(token) for token in ids)
        assert tokenizer.decode(ids) == without_edge_blanks(typed)


@settings(deadline=None, max_examples=500)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_unicode_text_has_the_ids_of_sentencepiece_by_the_original_rules(tokenizer: Tokenizer, text: str) -> None:
    """Control characters included: hiding the layout pieces from the text changes no other id."""
    pieces = tokenizer.encode_as_pieces(text)
    folded = unicodedata.normalize("NFKC", text)
    if "<" not in folded:  # otherwise it may spell a layout piece
        assert tokenizer.encode(text) == [tokenizer.piece_to_id(piece) for piece in pieces]


def test_runs_of_blanks_take_the_longest_pieces_first(tokenizer: Tokenizer) -> None:
    blank = tokenizer.piece_to_id
    assert tokenizer.encode("a" + " " * 85 + "x") == [104, blank("<|blank_80|>"), blank("<|blank_5|>"), 149]
    assert tokenizer.encode("a" + " " * 160 + "x") == [104, blank("<|blank_80|>"), blank("<|blank_80|>"), 149]
    assert tokenizer.decode(tokenizer.encode("a" + " " * 161 + "x")) == "a" + " " * 161 + "x"


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("１２ ﬁ", "12 fi"),
        ("a\r\nb", "a \nb"),
        (" a ", "a"),
        ("a\u3000 b", "a b"),
        ("a▁b", "a b"),
        ("a\u200bb\x07c", "a bc"),
        ("\x01!\x01\x02", "!"),
    ],
)
def test_losses_are_those_that_the_docs_name(tokenizer: Tokenizer, typed: str, kept: str) -> None:
    assert tokenizer.decode(tokenizer.encode(typed)) == kept


def test_control_characters_cannot_forge_a_newline(tokenizer: Tokenizer) -> None:
    for code in range(0x21, 0x80):
        typed = f"a\x01{chr(code)}b"
        assert tokenizer.encode(typed) == tokenizer.encode(f"a\x02{chr(code)}b")
        assert "\n" not in tokenizer.decode(tokenizer.encode(typed))


def test_half_a_surrogate_pair_is_encoded_like_a_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud83db") == tokenizer.encode("a\ufffdb")


def test_unknown_characters_are_spelled_in_bytes_also_with_the_first_release_file(first_release: Tokenizer) -> None:
    assert first_release.encode("龘") == [20005, 150321, 150278, 150240]
    assert first_release.decode([20005, 150321, 150278, 150240]) == "龘"


def test_a_long_text_comes_back(tokenizer: Tokenizer) -> None:
    text = ("春眠不觉晓 the quick brown fox\n\t    龘 <n> " * 6_000).rstrip()
    assert len(text) > 200_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_empty_text_gives_no_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode_context("") == [130001, 130004]


def test_a_copied_or_pickled_tokenizer_gives_the_same_ids(reduced: Tokenizer) -> None:
    text = "a\n  b 龘"
    for other in (copy.deepcopy(reduced), pickle.loads(pickle.dumps(reduced))):
        assert other.encode(text) == reduced.encode(text)
        assert other.decode(other.encode(text)) == text


def test_importing_the_tokenizer_needs_neither_torch_nor_protobuf() -> None:
    code = (
        "import sys, chatglm.tokenizer; "
        "print(sorted({'torch', 'transformers', 'google.protobuf', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
