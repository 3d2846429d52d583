"""ChatGLMTokenizer beyond the recorded cases: what a call returns, saving, added tokens, refusals."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import chatglm.hf
from chatglm.errors import TokenizerError

TEXTS = ["你好", "a <sop> b\n\tc", "it's 龘 fine .", "<n>[gMASK]"]


@pytest.fixture(scope="module")
def tokenizer(slim_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(slim_folder))


def test_a_call_without_padding_returns_only_ids(tokenizer: Any) -> None:
    assert dict(tokenizer("你好")) == {"input_ids": [5, 74874, 130001, 130004]}
    assert dict(tokenizer(["你好"])) == {"input_ids": [[5, 74874, 130001, 130004]]}
    found = tokenizer("你好", return_tensors="pt")
    assert list(found) == ["input_ids"] and found["input_ids"].tolist() == [[5, 74874, 130001, 130004]]


def test_a_padded_batch_stands_left(tokenizer: Any) -> None:
    found = tokenizer(["你好", "hello 你好"], padding=True, return_tensors="pt")
    assert found["input_ids"].tolist() == [[3, 5, 74874, 130001, 130004], [14833, 5, 74874, 130001, 130004]]
    assert found["position_ids"].tolist()[0] == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 1]]
    assert found["attention_mask"][0, 0, -1].tolist() == [True, False, False, False, False]


def test_padding_on_the_right_is_refused(tokenizer: Any) -> None:
    right = copy.deepcopy(tokenizer)
    right.padding_side = "right"
    with pytest.raises(ValueError, match="padding stands left"):
        right(["a", "a b c"], padding=True)


def test_lists_of_features_are_padded_with_their_masks(tokenizer: Any) -> None:
    features = [dict(tokenizer(text)) for text in TEXTS[:2]]
    found = tokenizer.pad(features, padding=True, return_tensors="pt")
    again = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    for name in again:
        assert torch.equal(found[name], again[name])


def test_a_saved_tokenizer_is_the_same_and_points_to_no_code(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in stored and stored["num_image_tokens"] == 0 and stored["gmask_token"] == "[gMASK]"
    assert not list(tmp_path.glob("*.py"))
    again = chatglm.hf.ChatGLMTokenizer.from_pretrained(str(tmp_path))
    same = pickle.loads(pickle.dumps(again))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids and same.encode(text) == ids
        assert again.decode(ids) == same.decode(ids) == tokenizer.decode(ids)
    assert again.all_special_tokens == tokenizer.all_special_tokens and len(again) == len(tokenizer)


def test_a_saved_first_release_tokenizer_keeps_its_ids(first_release_folder: Path, tmp_path: Path) -> None:
    first = AutoTokenizer.from_pretrained(str(first_release_folder))
    first.save_pretrained(str(tmp_path))
    again = chatglm.hf.ChatGLMTokenizer.from_pretrained(str(tmp_path))
    assert again.encode("你好</s>") == first.encode("你好</s>") == [20005, 94874, 20002, 150001, 150004]


def test_a_users_own_token_is_one_token(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    assert own.add_tokens(["<mine>"]) == 1
    assert own.encode("a <mine> b", add_special_tokens=False) == [104, 130344, 463]
    assert own.tokenize("a<mine>") == ["▁a", "<mine>"]


def test_special_strings_can_be_left_as_text(tokenizer: Any) -> None:
    assert 130004 not in tokenizer.encode("a <sop> b", add_special_tokens=False, split_special_tokens=True)


def test_ids_without_a_piece_decode_to_nothing(tokenizer: Any, first_release_folder: Path) -> None:
    assert tokenizer.decode([5, 74874, 130_400, 130_527]) == "你好"
    first = AutoTokenizer.from_pretrained(str(first_release_folder))
    assert first.decode([7, 20005, 94874, 150_400]) == "你好"


def test_lower_case_and_blank_removal_act(slim_folder: Path) -> None:
    own = chatglm.hf.ChatGLMTokenizer.from_pretrained(str(slim_folder), do_lower_case=True, remove_space=True)
    assert own.encode(" A   B ") == own.encode("a b")


def test_a_damaged_file_is_one_error_naming_it(slim_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ice_text.model").write_bytes((slim_folder / "ice_text.model").read_bytes()[:1000])
    with pytest.raises(TokenizerError, match=r"ice_text\.model.*1,000 bytes"):
        chatglm.hf.ChatGLMTokenizer(str(tmp_path / "ice_text.model"))


def test_special_tokens_masks_mark_what_was_added(tokenizer: Any) -> None:
    found = tokenizer("你好", "hello", return_special_tokens_mask=True)
    assert found["special_tokens_mask"] == [0, 0, 1, 1, 0, 1]
    assert tokenizer.get_special_tokens_mask(found["input_ids"], already_has_special_tokens=True) == [0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("stored", ["nothing", "no class", "no class, only code"])
def test_a_folder_with_little_or_no_tokenizer_config_opens(stored: str, slim_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "ice_text.model"):
        (tmp_path / name).write_bytes((slim_folder / name).read_bytes())
    (tmp_path / "tokenization_chatglm.py").write_text("raise SystemExit('the checkpoint ran its own code')")
    if stored != "nothing":
        config = json.loads((slim_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        del config["tokenizer_class"]
        if stored == "no class":
            del config["auto_map"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for trust in (True, None):
        found = AutoTokenizer.from_pretrained(str(tmp_path), trust_remote_code=trust)
        assert type(found) is chatglm.hf.ChatGLMTokenizer and found.encode("你好") == [5, 74874, 130001, 130004]
