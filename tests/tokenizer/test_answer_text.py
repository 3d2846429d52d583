"""Streamed text: stop strings across token borders, post-processing, and pieces that join to the whole."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatglm.tokenizer import Tokenizer
from chatglm.tokenizer.answer_text import AnswerText
from chatglm.tokenizer.response import normalize_answer
from chatglm.tokenizer.stop_strings import StopStrings


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.from_file(golden / "tokenizer-reduced" / "ice_text.model")


@pytest.fixture(scope="module")
def full_tokenizer(tokenizer_file):
    return Tokenizer.from_file(tokenizer_file)


def until_stop(text: str, stop: tuple[str, ...]) -> str:
    places = [place for part in stop if (place := text.find(part)) >= 0]
    return text[: min(places)] if places else text


@given(
    st.lists(st.text("ab|", max_size=4), max_size=8),
    st.lists(st.text("ab|", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string_wherever_it_is_cut(pieces, stop):
    matcher = StopStrings(tuple(stop))
    given_out = ""
    text = ""
    for piece in pieces:
        text += piece
        given_out += matcher.push(piece)
        if matcher.is_found:
            break
    assert matcher.is_found == any(part in text for part in stop)
    if not matcher.is_found:
        given_out += matcher.finish()
    assert given_out == until_stop(text, tuple(stop))


def test_nothing_is_held_back_that_cannot_become_a_stop_string():
    matcher = StopStrings(("<end>",))
    assert matcher.push("hello <") == "hello "
    assert matcher.push("b>") == "<b>"
    assert matcher.push("x<end>y") == "x"
    assert matcher.push("more") == "" and matcher.is_found


def test_without_stop_strings_text_passes_through():
    matcher = StopStrings(())
    assert matcher.push("abc") == "abc" and matcher.finish() == ""


def stream(tokenizer, ids, **options):
    answer = AnswerText(tokenizer, **options)
    pieces = [answer.push(token) for token in ids]
    pieces.append(answer.finish())
    assert "".join(pieces) == answer.text
    return answer, pieces


def test_pieces_join_to_the_post_processed_text_of_golden_pairs(full_tokenizer, golden):
    recorded = json.loads((golden / "chat" / "prompts.json").read_text(encoding="utf-8"))["process_response"]
    for raw, _ in next(entry["pairs"] for entry in recorded if entry["era"] == "v110"):
        ids = full_tokenizer.encode(raw)
        answer, _ = stream(full_tokenizer, ids)
        assert answer.text == normalize_answer(full_tokenizer.decode(ids))


@given(ids=st.lists(st.integers(0, 543), max_size=30))
def test_any_ids_stream_to_the_text_they_decode_to(tokenizer, ids):
    answer, _ = stream(tokenizer, ids)
    assert answer.text == normalize_answer(tokenizer.decode(ids))
    raw, _ = stream(tokenizer, ids, normalize=False)
    assert raw.text == tokenizer.decode(ids)


@given(text=st.text("中文,!:;?[]训练时间 \nab", max_size=20))
def test_streamed_punctuation_is_never_taken_back(full_tokenizer, text):
    ids = full_tokenizer.encode(text)
    answer, _ = stream(full_tokenizer, ids)
    assert answer.text == normalize_answer(full_tokenizer.decode(ids))


def test_stop_string_is_found_after_post_processing(full_tokenizer):
    ids = full_tokenizer.encode("你好,世界。再见!")
    answer, _ = stream(full_tokenizer, ids, stop=("，世",))
    assert answer.text == "你好" and answer.is_stopped


def test_stop_string_at_the_very_end_is_found(full_tokenizer):
    answer, _ = stream(full_tokenizer, full_tokenizer.encode("好的!"), stop=("！",))
    assert answer.text == "好的" and answer.is_stopped
