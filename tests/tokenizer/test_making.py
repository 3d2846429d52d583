"""Tokenizer files that are made from texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatglm.errors import TokenizerError
from chatglm.tokenizer import Tokenizer
from chatglm.tokenizer.making import make_tokenizer_file

TEXTS = ["The sky is blue.", "天空是蓝色的。", "The sea is blue and the grass is green.", "草是绿色的。"] * 5


def test_a_made_file_reads_as_the_original_does_and_loses_no_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(make_tokenizer_file(TEXTS, tmp_path, pieces=420))
    assert tokenizer.pieces <= 420
    assert len({tokenizer.mask_id, tokenizer.gmask_id, tokenizer.sop_id, tokenizer.eop_id, tokenizer.pad_id}) == 5
    for text in [*TEXTS[:4], "a\n\tb   c", "鑫 🙂 [gMASK] <n>"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not any(tokenizer.is_special(token) for token in ids)


def test_the_same_texts_make_the_same_file(tmp_path: Path) -> None:
    first, second = (make_tokenizer_file(TEXTS, tmp_path / name, pieces=420) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_too_few_pieces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="347 have a fixed meaning"):
        make_tokenizer_file(TEXTS, tmp_path, pieces=300)
