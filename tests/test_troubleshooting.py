"""docs/troubleshooting.md quotes messages that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
OURS = ("What chatglm says", "What the set-up says")

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="docs/ is not beside the tests")


def quoted() -> list[str]:
    """Texts in backticks of the headings under the sections of our own messages."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ours = [section for section in sections if section.startswith(OURS)]
    return [
        text
        for section in ours
        for heading in re.findall(r"^### (.+)$", section, re.M)
        for text in re.findall("`([^`]+)`", heading)
    ]


def messages() -> str:
    """Every string of the sources, joined; implicit concatenation and f-strings put together."""
    texts = []
    for path in (*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


@pytest.mark.parametrize("text", quoted() if PAGE.is_file() else [])
def test_a_quoted_message_is_one_that_the_code_can_print(text: str) -> None:
    everything = messages()
    for part in text.split("…"):
        assert part.strip() in everything, part


def test_the_page_quotes_messages() -> None:
    assert len(quoted()) > 15
