"""Blanks, easy questions, and models side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chatglm.chat import EMBEDDED_MODEL
from chatglm.errors import RequestError
from chatglm.evaluation import ability, blanks, choices
from chatglm.evaluation.ability import MEASURES, measure_ability
from chatglm.evaluation.forms import form_named, model_in
from chatglm.model import GLM
from chatglm.tokenizer import Tokenizer
from checkpoint_folders import small_safetensors

TEXT = "The river runs through the valley, past the old mill and the bridge. " * 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def model() -> GLM:
    return model_in(EMBEDDED_MODEL, form_named("stored"), torch.device("cpu"))


def test_a_blank_and_its_answer_are_the_text_again(tokenizer: Tokenizer) -> None:
    found = blanks.make_blanks(tokenizer, [TEXT])
    ids = tokenizer.encode(TEXT)
    assert len(found) == len(ids) // blanks.PIECE_TOKENS > 1
    for number, blank in enumerate(found):
        place = blank.context_ids.index(tokenizer.mask_id)
        whole = [*blank.context_ids[:place], *blank.answer_ids, *blank.context_ids[place + 1 :]]
        assert whole == ids[number * blanks.PIECE_TOKENS : (number + 1) * blanks.PIECE_TOKENS]
        assert 1 <= len(blank.answer_ids) <= blanks.LONGEST_BLANK


def test_blanks_depend_on_seed_and_number_alone(tokenizer: Tokenizer) -> None:
    found = blanks.make_blanks(tokenizer, [TEXT], seed=3)
    assert found[:2] == blanks.make_blanks(tokenizer, [TEXT], seed=3, most=2)
    assert found != blanks.make_blanks(tokenizer, [TEXT], seed=4)
    with pytest.raises(RequestError, match="no text has 64 tokens"):
        blanks.make_blanks(tokenizer, ["short"])


def test_accuracy_counts_what_was_filled(tokenizer: Tokenizer, model: GLM, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = blanks.Blank((5, 6), (7, 8)), blanks.Blank((5, 6), (9,))
    monkeypatch.setattr(blanks, "fill", lambda *_: [[7, 8], [9, 4]])
    found = blanks.blank_accuracy(model, tokenizer, [one, two], lambda _: None)
    assert (found["exact"], found["tokens_right"], found["first_right"]) == (0.5, 1.0, 1.0)


def test_a_blank_is_filled_from_the_mask_by_the_model(tokenizer: Tokenizer, model: GLM) -> None:
    (blank,) = blanks.make_blanks(tokenizer, [TEXT], most=1)
    counted: list[int] = []
    (filled,) = blanks.fill(model, tokenizer, [blank], counted.append)
    assert counted == [1] and len(filled) <= blanks.LONGEST_BLANK + 4
    assert tokenizer.eop_id not in filled


def test_the_likeliest_option_counts_for_its_language(tokenizer: Tokenizer, model: GLM) -> None:
    asked = [
        choices.Choice("What is the capital of France?", ("xqz blorp", "The capital of France is Paris."), 1, "en"),
        choices.Choice("中国的首都是哪里？", ("中国的首都是北京。", "锅伞鞋沙"), 1, "zh"),
    ]
    found = choices.choice_accuracy(model, tokenizer, asked, lambda _: None)
    assert (found["accuracy"], found["accuracy_en"], found["accuracy_zh"]) == (0.5, 1.0, 0.0)
    assert found["by_chance"] == 0.5


def test_own_questions_have_four_options_and_both_languages_alike() -> None:
    own = choices.read_choices()
    assert {len(choice.options) for choice in own} == {4}
    assert sum(choice.language == "zh" for choice in own) * 2 == len(own) == 40
    assert len({choice.question for choice in own}) == len(own)


def test_a_broken_question_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question": "?", "options": ["a"], "right": 1, "language": "en"}), encoding="utf-8")
    with pytest.raises(RequestError, match="line 1"):
        choices.read_choices(file)


def test_a_second_model_is_shown_beside_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = small_safetensors(tmp_path / "before"), small_safetensors(tmp_path / "after")
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(ability, "read_choices", lambda: choices.read_choices()[:3])
    report = measure_ability([before, after], files=[text])
    first, second = report["rows"]
    assert [row["model"] for row in (first, second)] == ["before", "after"]
    assert "change" not in first and second["change"] == dict.fromkeys(MEASURES, 0.0)
    assert first["bits_per_byte"] == first["files"]["text.txt"] > 0
