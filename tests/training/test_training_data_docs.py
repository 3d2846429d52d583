"""docs/training-data.md says what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from chatglm.config import ModelConfig
from chatglm.training.data.formats import Dialogue, Preference, Text, parse
from chatglm.training.data.problems import KINDS
from chatglm.training.masks import dense_blocked
from chatglm.training.objective import MIXTURES, SpecialIds, fill_spans
from chatglm.training.objective.spans import Span
from chatglm.training.samples import IGNORE, collate

PAGE = Path(__file__).parents[2] / "docs" / "training-data.md"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def table_under(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table behind a line."""
    lines = page[page.index(heading) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| ---")) + 1
    rows = [line for line in lines[first:]]
    end = next(number for number, line in enumerate(rows) if not line.startswith("|"))
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows[:end]]


def test_every_format_of_the_table_is_read_as_it_says(page: str) -> None:
    rows = table_under(page, "## Formats")
    assert len(rows) == 11
    for _, example, becomes in rows:
        record = parse(json.loads(example.strip("`")))
        expected = (
            Dialogue if becomes.startswith("a dialogue") else Text if becomes.startswith("a text") else Preference
        )
        assert isinstance(record, expected), example


def test_every_kind_of_problem_is_explained(page: str) -> None:
    told = {kind for row in table_under(page, "## What is wrong") for kind in re.findall(r"`(\w+)`", row[0])}
    assert told == set(KINDS)


def test_every_mixture_is_in_the_table(page: str) -> None:
    section = page[page.index("| mixture |") : page.index("ChatGLM-6B's own mixture")]
    assert {name for name in MIXTURES if f"`{name}`" in section} == set(MIXTURES)
    for row in table_under(page, "Three ways to cut"):
        for name in re.findall(r"`([\w.-]+)`", row[0]):
            mixture = MIXTURES[name]
            shares = [float(share) for share in row[1].split("/")]
            assert shares == [mixture.token, mixture.sentence, mixture.document]


def test_the_worked_example_is_what_the_code_makes(page: str) -> None:
    ids = SpecialIds.of_config(ModelConfig())
    text = np.arange(11, 21, dtype=np.int32)
    sample = fill_spans(text, [Span(2, 3), Span(5, 8)], [1, 0], ids, mask=ids.mask, objective="token")
    allowed = ~dense_blocked(collate([[sample]]))[0, 0]
    rows = table_under(page, "Ten tokens 11")
    assert len(rows) == len(sample) == 14
    for i, (place, token, target, position, block, sees) in enumerate(rows):
        wanted = sample.targets[i]
        assert [int(place), int(token)] == [i, sample.ids[i]]
        assert target == ("" if wanted == IGNORE else str(wanted))
        assert [int(position), int(block)] == sample.positions[:, i].tolist()
        last = int(sees.split("–")[1])
        assert torch.equal(allowed[i], torch.arange(14) <= last)
