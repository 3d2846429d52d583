"""Ids, pieces and texts against what the original recorded, for every era and form of the file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatglm.tokenizer import Tokenizer, template

Lines = Callable[[str], list[dict[str, Any]]]

# Where native encoding differs on purpose: text that spells a special piece or a layout piece of the original.
SPECIAL = re.compile(r"<sop>|<eop>|\[MASK\]|<pad>|<unk>|</s>")
SPELLED = re.compile(SPECIAL.pattern + r"|<n>|<\|tab\|>|<\|blank_\d+\|>")

# Native decoding leaves `<unk>` out; the original shows it as U+2047 with blanks around.
UNKNOWN_SHOWN = "⁇"


def plain(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases whose text spells no piece; nearly all of them."""
    found = [case for case in cases if not SPELLED.search(case["text"])]
    assert len(found) > 550
    return found


@pytest.mark.parametrize("name", ["v1.1.0.jsonl", "v0.1.0.jsonl"])
def test_ids_of_every_plain_text_equal_the_original(tokenizer: Tokenizer, lines: Lines, name: str) -> None:
    wrong = [case["text"] for case in plain(lines(name)) if tokenizer.encode(case["text"]) != case["ids"]]
    assert wrong == []


def test_first_release_ids_of_every_plain_text_equal_the_original(first_release: Tokenizer, lines: Lines) -> None:
    cases = plain(lines("preslim.jsonl"))
    wrong = [case["text"] for case in cases if first_release.encode(case["text"]) != case["ids"]]
    assert wrong == []


def test_a_context_ends_in_gmask_and_sop_as_the_original_puts_them(
    tokenizer: Tokenizer, first_release: Tokenizer, lines: Lines
) -> None:
    for case in plain(lines("v1.1.0.jsonl"))[:100]:
        assert tokenizer.encode_context(case["text"]) == case["ids_special"]
    for case in plain(lines("preslim.jsonl"))[:100]:
        assert first_release.encode_context(case["text"]) == case["ids_special"]


def test_native_decode_equals_the_original_without_its_clean_up(tokenizer: Tokenizer, lines: Lines) -> None:
    for case in [*lines("v1.1.0.jsonl"), *lines("v0.1.0.jsonl")]:
        expected = case.get("decode_no_cleanup", case["decode"])
        if UNKNOWN_SHOWN not in expected:
            assert tokenizer.decode(case["ids"]) == expected


def test_first_release_decode_equals_the_original(first_release: Tokenizer, lines: Lines) -> None:
    for case in lines("preslim.jsonl"):
        if UNKNOWN_SHOWN not in case["decode"]:
            assert first_release.decode(case["ids"]) == case["decode"]


def test_random_ids_with_bytes_and_special_ids_decode_as_in_the_original(tokenizer: Tokenizer, lines: Lines) -> None:
    compared = 0
    for case in lines("decode-ids.jsonl"):
        assert [tokenizer.id_to_piece(token) for token in case["ids"]] == case["tokens"]
        assert tokenizer.decode_pieces(case["tokens"]) == case["decode"]
        if UNKNOWN_SHOWN not in case["decode"]:
            compared += 1
            assert tokenizer.decode(case["ids"]) == case["decode"]
    assert compared > 100


def test_single_ids_decode_as_in_the_original(tokenizer: Tokenizer, lines: Lines) -> None:
    for case in lines("single-ids.jsonl"):
        assert tokenizer.id_to_piece(case["id"]) == case["token"]
        assert tokenizer.decode_pieces([case["token"]]) == case["decode"]
        if UNKNOWN_SHOWN not in case["decode"]:
            assert tokenizer.decode([case["id"]]) == case["decode"]


def test_pieces_of_every_text_without_special_pieces_equal_the_original(tokenizer: Tokenizer, lines: Lines) -> None:
    for case in lines("v1.1.0.jsonl"):
        if not SPECIAL.search(case["text"]):
            assert tokenizer.encode_as_pieces(case["text"]) == case["tokens"]
        expected = case.get("decode_no_cleanup", case["decode"])
        assert tokenizer.decode_pieces(case["tokens"]) == expected


@pytest.mark.parametrize("era", ["v110", "v010", "e551"])
def test_ids_of_pieces_equal_the_original(
    tokenizer: Tokenizer, first_release: Tokenizer, golden: Path, era: str
) -> None:
    recorded = json.loads((golden / "tokenizer" / "summary.json").read_text(encoding="utf-8"))["eras"][era]
    ours = first_release if era == "e551" else tokenizer
    expected = {piece: token for piece, token in recorded["convert_tokens_to_ids"].items() if "<image_" not in piece}
    assert {piece: ours.piece_to_id(piece) for piece in expected} == expected
    assert len(ours) == ours.vocab_size == recorded["attributes"]["vocab_size"]


def test_all_pieces_hash_to_the_recorded_sum(tokenizer: Tokenizer, first_release: Tokenizer, golden: Path) -> None:
    summary = json.loads((golden / "tokenizer" / "summary.json").read_text(encoding="utf-8"))
    expected = summary["eras"]["v110"]["sha256_of_json_list_of_all_pieces"]
    for ours in (tokenizer, first_release):
        pieces = [ours.id_to_piece(token) for token in range(ours.offset, ours.vocab_size)]
        compact = json.dumps(pieces, ensure_ascii=False, separators=(",", ":"))
        assert hashlib.sha256(compact.encode()).hexdigest() == expected


def chat_cases(golden: Path, era: str) -> list[dict[str, Any]]:
    recorded = json.loads((golden / "chat" / "prompts.json").read_text(encoding="utf-8"))
    cases = [case for case in recorded["eras"][era]["cases"] if "input_ids" in case]
    return [case for case in cases if not SPELLED.search(json.dumps([case["query"], case["history"]]))]


@pytest.mark.parametrize("era", ["v110", "v010", "e551", "e220"])
def test_chat_prompts_have_the_ids_of_the_original(
    tokenizer: Tokenizer, first_release: Tokenizer, golden: Path, era: str
) -> None:
    ours = first_release if era.startswith("e") else tokenizer
    cases = chat_cases(golden, era)
    assert len(cases) >= 8
    for case in cases:
        rounds = [(asked, answered) for asked, answered in case["history"]]
        fitted = template.fit(ours, case["query"], rounds, limit=2048)
        assert [fitted.ids] == case["input_ids"]


def test_embedded_model_contexts_equal_the_reference(shared: Path, embedded: Tokenizer) -> None:
    cases = json.loads((shared / "mini" / "reference.json").read_text(encoding="utf-8"))["cases"]
    cases = [case for case in cases if not SPELLED.search(case["question"])]
    assert len(cases) >= 15
    for case in cases:
        rounds = [(asked, answered) for asked, answered in case["history"]]
        assert template.fit(embedded, case["question"], rounds, limit=1024).ids == case["ids"]
