"""The original tokenizer's vectors through ChatGLMTokenizer: ids, pieces, text, pairs, batches, attributes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer(slim_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(slim_folder), trust_remote_code=True)


@pytest.fixture(scope="module")
def first_release(first_release_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(first_release_folder), trust_remote_code=True)


def lines(golden: Path, name: str) -> list[dict[str, Any]]:
    stored = (golden / "tokenizer" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in stored.split("\n") if line]  # the texts hold other line ends


def test_ids_and_pieces_of_every_text_equal_v110(tokenizer: Any, golden: Path) -> None:
    for case in lines(golden, "v1.1.0.jsonl"):
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"]) == case["ids_special"], case["text"]
        assert tokenizer.tokenize(case["text"]) == case["tokens"], case["text"]


def test_ids_of_every_text_equal_v010(tokenizer: Any, golden: Path) -> None:
    for case in lines(golden, "v0.1.0.jsonl"):
        assert tokenizer(case["text"])["input_ids"] == case["ids_special"], case["text"]


def test_ids_of_every_text_equal_the_first_release(first_release: Any, golden: Path) -> None:
    for case in lines(golden, "preslim.jsonl"):
        assert first_release.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
        assert first_release.encode(case["text"]) == case["ids_special"], case["text"]


def test_text_of_every_case_equals_v110(tokenizer: Any, golden: Path) -> None:
    for case in lines(golden, "v1.1.0.jsonl"):
        assert tokenizer.decode(case["ids"]) == case["decode"]
        untidy = tokenizer.decode(case["ids"], clean_up_tokenization_spaces=False)
        assert untidy == case.get("decode_no_cleanup", case["decode"])
        assert tokenizer.decode(case["ids_special"]) == case["decode_special"]
        assert tokenizer.decode(case["ids_special"], skip_special_tokens=True) == case["decode_special_skip"]


def test_partial_and_random_ids_decode_as_v110(tokenizer: Any, golden: Path) -> None:
    for case in lines(golden, "partial-decode.jsonl"):
        found = [tokenizer.decode(case["ids"][: k + 1]) for k in range(len(case["prefix_decodes"]))]
        assert found == case["prefix_decodes"]
    for case in lines(golden, "decode-ids.jsonl"):
        assert tokenizer.decode(case["ids"]) == case["decode"]
        assert tokenizer.decode(torch.tensor(case["ids"]), skip_special_tokens=True) == case["decode_skip"]
        assert tokenizer.convert_ids_to_tokens(case["ids"]) == case["tokens"]
    for case in lines(golden, "single-ids.jsonl"):
        assert tokenizer.convert_ids_to_tokens(case["id"]) == case["token"]
        assert tokenizer.decode([case["id"]]) == case["decode"]
        assert tokenizer.decode(case["id"]) == case["decode_int"]


def rows_of(mask: Any) -> list[str]:
    return ["".join(str(int(value)) for value in row) for row in mask[0].tolist()]


def test_pairs_truncation_and_padding_equal_v110(tokenizer: Any, golden: Path) -> None:
    kinds = set()
    for case in lines(golden, "pairs-and-batches.jsonl"):
        kinds.add(case["kind"])
        if case["kind"] == "pair":
            found = tokenizer(case["text"], case["pair"])
            assert list(found) == case["keys"] and found["input_ids"] == case["input_ids"]
        elif case["kind"] == "truncation":
            assert tokenizer(case["text"], **case["kwargs"])["input_ids"] == case["input_ids"]
        elif case["kind"] == "batch":
            found = tokenizer(case["texts"], return_tensors="pt", **case["kwargs"])
            assert found["input_ids"].tolist() == case["input_ids"]
            assert found["position_ids"].tolist() == case["position_ids"]
            assert list(found["attention_mask"].shape) == case["attention_mask_shape"]
            assert found["attention_mask"].dtype == torch.bool and found["position_ids"].dtype == torch.int64
            assert [rows_of(mask) for mask in found["attention_mask"]] == case["attention_mask_rows"]
        else:
            found = tokenizer.pad({"input_ids": case["input"]}, **case["kwargs"])
            assert list(found["input_ids"]) == case["input_ids"]
            assert found["position_ids"].tolist() == case["position_ids"]
            assert [rows_of(found["attention_mask"])] == case["attention_mask_rows"]
    assert kinds == {"pair", "batch", "truncation", "pad_ids"}


@pytest.mark.parametrize("era", ["v110", "v010"])
def test_attributes_equal_the_originals(tokenizer: Any, golden: Path, era: str) -> None:
    summary = json.loads((golden / "tokenizer" / "summary.json").read_text(encoding="utf-8"))["eras"][era]
    check_attributes(tokenizer, summary)
    digest = summary.get("sha256_of_json_list_of_all_pieces")
    if digest:
        pieces = tokenizer.convert_ids_to_tokens(list(range(tokenizer.vocab_size)))
        text = json.dumps(pieces, ensure_ascii=False, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_attributes_equal_those_of_the_first_release(first_release: Any, golden: Path) -> None:
    check_attributes(first_release, json.loads((golden / "tokenizer" / "summary.json").read_text())["eras"]["e551"])


def check_attributes(tokenizer: Any, summary: dict[str, Any]) -> None:
    for name, expected in summary["attributes"].items():
        assert (len(tokenizer) if name == "len(tokenizer)" else getattr(tokenizer, name)) == expected, name
    for piece, expected in summary["convert_tokens_to_ids"].items():
        assert tokenizer.convert_tokens_to_ids(piece) == expected, piece
