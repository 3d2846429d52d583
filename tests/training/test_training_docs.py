"""docs/training.md names every setting, with its default where that is a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatglm.training.pretrain import PretrainRun
from chatglm.training.run_config import RunConfig
from chatglm.training.settings import build

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def keys(settings: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


@pytest.mark.skipif(not PAGE.is_file(), reason="docs/ is not beside the tests")
def test_the_page_names_every_key_and_no_other() -> None:
    run = build(PretrainRun, {"out": "a", "steps": 1}, "test")
    table = [line.split("|")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = {part.strip(" `") for cell in table for part in cell.split(",")}
    known = set(keys(run))
    assert known <= named, sorted(known - named)
    sections = {field.name for field in dataclasses.fields(RunConfig)} | {"data"}
    invented = {name for name in named if "." in name and name.split(".")[0] in sections} - known
    assert not {name for name in invented if name != "metrics.jsonl"}
