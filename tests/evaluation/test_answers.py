"""Files of questions, and answers measured against the wanted ones or by a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatglm.errors import RequestError
from chatglm.evaluation import answers as suite
from chatglm.evaluation.answers import Answering, measure_answers
from chatglm.evaluation.judges import AtMost
from chatglm.evaluation.pairs import Pair, read_pairs


def written(folder: Path, *records: Any) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "response": "a"},
        {"content": "q", "summary": "a"},
        {"question": "q", "answer": "a"},
        {"instruction": "q", "input": "", "output": "a"},
    ],
)
def test_known_field_names_are_found(tmp_path: Path, record: dict[str, str]) -> None:
    assert read_pairs(written(tmp_path, record)) == [Pair("q", "a")]


def test_columns_history_and_input_are_read(tmp_path: Path) -> None:
    file = written(tmp_path, {"x": "q", "y": "a", "input": "more", "history": [["q0", "a0"]]})
    assert read_pairs(file, prompt_column="x", answer_column="y") == [Pair("q\nmore", "a", (("q0", "a0"),))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "q"', "line 1: not JSON"),
        ('{"prompt": "q", "response": "a"}\n[1]', "line 2: list"),
        ('{"promt": "q"}', "the keys are promt; expected a text in one of `prompt`"),
        ('{"prompt": "q", "response": "a", "history": ["x"]}', "history must be"),
        ("", "holds no prompt"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=said.replace("[", r"\[")):
        read_pairs(file)


class Echo:
    """A model that answers with its name."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name

    def generate(self, prompts: list[str], settings: list[Any]) -> list[Any]:
        return [type("Reply", (), {"text": self.name})() for _ in prompts]

    def chat(self, prompt: str, history: list[tuple[str, str]], **sampling: Any) -> Any:
        return type("Reply", (), {"text": f"{history[0][0]} {sampling['seed']}"})()


def test_models_are_compared_with_the_first_by_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "load", lambda folder, *_, **__: Echo(folder))
    pairs = [Pair("q", None), Pair("q", None, (("before", "a"),))]
    told: list[tuple[int, int, str]] = []
    report = measure_answers(
        [Path("much too long"), Path("ok")], pairs, Answering(seed=5), judge=AtMost(8), count=lambda *a: told.append(a)
    )
    assert [answer["predict"] for answer in report["answers"]] == [["much too long", "ok"], ["before 6", "before 6"]]
    assert [row["judged"] for row in report["rows"]] == [0.5, 1.0]
    assert "win_rate" not in report["rows"][0] and report["rows"][1]["win_rate"] == 0.75
    assert told[-1] == (4, 4, "ok")


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(RequestError, match="no wanted answers"):
        measure_answers([Path("a")], [Pair("q", None)], Answering())
