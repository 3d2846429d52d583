"""Dialogues and texts as contexts and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatglm.chat import EMBEDDED_MODEL
from chatglm.errors import RequestError
from chatglm.tokenizer import Tokenizer, template
from chatglm.tokenizer.examples import dialogue_examples, read_documents, read_examples, text_examples

ROUNDS = [("你好", "你好！有什么可以帮你？"), ("Where is Paris?", "In France."), ("谢谢", "不客气。")]
TEXT = "灯塔建在半岛的尽头，离最近的村子有七公里。 The keeper climbs the stairs every evening.\n\n" * 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(EMBEDDED_MODEL)


def test_each_round_is_an_example_with_the_rounds_before_it(tokenizer: Tokenizer) -> None:
    examples = list(dialogue_examples(tokenizer, ROUNDS, 1024))
    assert len(examples) == 3
    for number, example in enumerate(examples):
        question, answer = ROUNDS[number]
        prompt = template.render(question, ROUNDS[:number])
        assert [*example.context_ids, tokenizer.sop_id] == tokenizer.encode_context(prompt)
        assert list(example.answer_ids) == [*tokenizer.encode(answer), tokenizer.eop_id]
        assert example.num_bytes == len(answer.encode())
        assert len(example) == len(example.context_ids) + 1 + len(example.answer_ids)


def test_oldest_rounds_are_left_out_where_they_do_not_fit(tokenizer: Tokenizer) -> None:
    last = list(dialogue_examples(tokenizer, ROUNDS, 1024))[-1]
    shorter = list(dialogue_examples(tokenizer, ROUNDS, len(last) - 1))[-1]
    prompt = template.render("谢谢", ROUNDS[1:2])
    assert [*shorter.context_ids, tokenizer.sop_id] == tokenizer.encode_context(prompt)
    assert shorter.answer_ids == last.answer_ids


def test_a_round_that_alone_is_too_long_gives_no_example(tokenizer: Tokenizer) -> None:
    assert [*dialogue_examples(tokenizer, [("问" * 50, "答")], 20)] == []


@pytest.mark.parametrize(("limit", "span"), [(1024, 256), (1024, 17), (21, 256), (4, 256)])
def test_every_token_of_a_text_is_answered_once_behind_the_tokens_before_it(
    tokenizer: Tokenizer, limit: int, span: int
) -> None:
    examples = list(text_examples(tokenizer, TEXT, limit, span))
    ids = tokenizer.encode(TEXT)
    assert [token for example in examples for token in example.answer_ids] == ids
    start = 0
    for example in examples:
        *before, mask = example.context_ids
        assert mask == tokenizer.gmask_id and before == ids[start - len(before) : start]
        assert len(before) == min(start, span, (limit - 2) // 2)
        assert len(example) <= limit
        start += len(example.answer_ids)
    assert sum(example.num_bytes for example in examples) == len(TEXT.encode())


def test_bytes_add_up_where_a_span_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    text = "𠮷野家𠮷野家"  # byte pieces
    for span in range(1, 8):
        examples = list(text_examples(tokenizer, text, 1024, span))
        assert sum(example.num_bytes for example in examples) == len(text.encode())


def test_files_hold_dialogues_and_texts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = [
        {"turns": [["a", "b"], ["c", "d"]], "source": "x"},
        {"question": "e", "answer": "f"},
        {"text": "g h"},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert read_documents(file) == [[("a", "b"), ("c", "d")], [("e", "f")], "g h"]
    assert len(read_examples(file, tokenizer, 1024)) == 4
    assert len(read_examples(file, tokenizer, 1024, most=1)) == 2
    plain = tmp_path / "plain.txt"
    plain.write_text(TEXT, encoding="utf-8")
    assert read_documents(plain) == [TEXT]
    assert read_examples(plain, tokenizer, 1024, most=2) == list(text_examples(tokenizer, TEXT, 1024))[:2]


@pytest.mark.parametrize("line", ['{"turns": [["a"]]}', "[1]", "{", '{"question": "a"}', '{"text": 3}', '"a"', "null"])
def test_a_line_that_is_neither_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(RequestError, match=r"data\.jsonl, line 2: no dialogue"):
        read_documents(file)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"missing\.txt cannot be read"):
        read_documents(tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RequestError, match=r"latin\.txt cannot be read as UTF-8"):
        read_documents(tmp_path / "latin.txt")
