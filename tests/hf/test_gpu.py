"""The card's lines on a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from golden_vectors import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def load(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(str(folder)), AutoModel.from_pretrained(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_the_cards_lines_answer_on_the_device(bits: int, slim_folder: Path) -> None:
    tokenizer, model = load(slim_folder)
    model = model.half().quantize(bits).cuda()
    response, history = model.chat(tokenizer, "你好", history=[], max_length=60)
    assert history == [("你好", response)]
    *_, (streamed, _) = model.stream_chat(tokenizer, "你好", history=[], max_length=60, do_sample=False)
    assert streamed == model.chat(tokenizer, "你好", history=[], max_length=60, do_sample=False)[0]


@torch.no_grad()
def test_a_padded_batch_on_the_device_stays_close_to_the_cpu(small_folder: Path) -> None:
    tokenizer, model = load(small_folder)
    batch = tokenizer(["你好", "hello world, what is this?"], padding=True, return_tensors="pt")
    expected = model.float()(**batch).logits
    real = batch["input_ids"] != tokenizer.pad_token_id
    found = model.cuda()(**{name: value.cuda() for name, value in batch.items()}).logits.cpu()
    assert_close(found[real], expected[real], 1e-3)
    half = model.half()(**{name: value.cuda() for name, value in batch.items()}).logits.cpu()
    assert half.isfinite().all()
    assert_close(half[real], expected[real], 2e-2)
