"""What `check` finds: repetitions, leaks, and everything that makes preferences unfit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

import chatglm
from chatglm.training.data.checking import check
from chatglm.training.data.encoding import Reading
from chatglm.training.data.formats import Preference
from chatglm.training.data.layout import Layout
from chatglm.training.data.preferences import Judged, described, find_problems, is_held_out, prompt_key
from chatglm.training.data.preparing import open_tokenizer

TOKENIZER = Path(chatglm.__file__).parent / "assets" / "mini"


def write(path: Path, *objects: Any) -> str:
    path.write_text("".join(json.dumps(found, ensure_ascii=False) + "\n" for found in objects), encoding="utf-8")
    return str(path)


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def found_in(tmp_path: Path, *objects: Any, **settings: Any) -> list[tuple[str, int]]:
    problems = check([write(tmp_path / "a.jsonl", *objects)], Reading(), **settings).problems
    return [(problem.kind, problem.line) for problem in problems]


def test_good_preferences_have_no_problems(tmp_path: Path) -> None:
    objects = [pair("q", "a", "b"), pair("q", "b", "c"), pair("q", "a", "c"), pair("q2", "b", "a", margin=0.5)]
    assert found_in(tmp_path, *objects, {"prompt": "q", "answer": "a", "score": 1}) == []


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ([pair("q", "a", "b"), pair(" q", "a ", "b")], [("duplicate", 2)]),
        ([pair("q", "a", "b"), pair("q", "b", "a")], [("contradiction", 2)]),
        ([pair("q", "a", "b", margin=-1)], [("contradiction", 1)]),
        ([pair("q", "a", "b", margin=0)], [("tie", 1)]),
        ([pair("q", "a", " a")], [("identical", 1)]),
        ([pair("q", "a", "")], [("empty", 1)]),
        ([pair("q", "", "a")], [("empty", 1)]),
        ([pair("q", "a", "b"), pair("q", "b", "c"), pair("q", "c", "a")], [("cycle", 3)]),
        ([pair("q", "a", "b"), pair("p", "b", "c"), pair("q", "c", "a")], []),
        (
            [{"prompt": "q", "answer": "a", "score": 1}, {"prompt": "q", "answer": "a", "score": -1}],
            [("contradiction", 2)],
        ),
        ([pair("q", "a", "b"), pair("q", "b", "a", history=[["x", "y"]])], []),
    ],
)
def test_what_is_wrong_with_preferences(
    tmp_path: Path, objects: list[dict[str, Any]], expected: list[tuple[str, int]]
) -> None:
    assert found_in(tmp_path, *objects) == expected


@given(order=st.permutations(list(range(6))), extra=st.integers(0, 4))
def test_a_ring_of_preferences_is_one_cycle_in_any_order(order: list[int], extra: int) -> None:
    ring = [(f"a{i}", f"a{(i + 1) % (3 + extra)}") for i in range(3 + extra)]
    tail = [("a0", "z1"), ("z1", "z2"), ("y", "a0")]
    edges = ring + tail
    edges = [edges[i] for i in order if i < len(edges)] + [edge for n, edge in enumerate(edges) if n not in order]
    judged = [Judged(Preference("q", (), *edge), "f", line) for line, edge in enumerate(edges, start=1)]
    problems = list(find_problems(judged))
    assert [problem.kind for problem in problems] == ["cycle"]
    assert f"{3 + extra} answers" in problems[0].message
    without = [found for found in judged if (found.record.chosen, found.record.rejected) != ring[0]]
    assert not list(find_problems(without))


def test_prompts_of_the_evaluation_set_are_found(tmp_path: Path) -> None:
    held_out = write(
        tmp_path / "eval.jsonl", {"turns": [["one", "a"], ["two", "b"]]}, {"prompt": "three", "response": "c"}
    )
    objects = [
        {"prompt": "three ", "response": "x"},
        {"prompt": "two", "response": "b"},  # asked there after another round
        {"prompt": "two", "response": "b", "history": [["one", "a"]]},
        pair("one", "x", "y"),
    ]
    assert found_in(tmp_path, *objects, against=[held_out]) == [("leakage", 1), ("leakage", 3), ("leakage", 4)]


def test_dialogues_and_texts_are_compared_with_themselves(tmp_path: Path) -> None:
    objects = [
        {"prompt": "q", "response": "a"},
        {"turns": [["q", "a"]]},
        {"instruction": "q", "output": "b"},
        {"text": "t"},
        {"text": "t"},
        {"turns": [["q", "a"], ["r", "b"]]},
    ]
    assert found_in(tmp_path, *objects) == [("duplicate", 2), ("contradiction", 3), ("duplicate", 5)]


def test_check_finds_what_prepare_finds_and_reads_to_the_end(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    long = json.dumps({"prompt": "q", "response": "word " * 100})
    file.write_bytes(b"{broken\n\n" + "坏".encode("gb18030") + b"\n[]\n" + long.encode() + b'\n{"prompt": "q"}\n')
    tokenizer = open_tokenizer(TOKENIZER)
    checked = check([str(file)], Reading(), tokenizer=tokenizer, layout=Layout(length=32))
    found = [(problem.kind, problem.line) for problem in checked.problems]
    assert found == [("json", 1), ("encoding", 3), ("json", 4), ("long", 5), ("keys", 6)]
    assert (checked.records, checked.dialogues) == (5, 1)


def test_prompts_are_held_out_whole_and_by_their_share() -> None:
    keys = [prompt_key(f"prompt {number}") for number in range(4000)]
    held = [is_held_out(key, 0.1, seed=3) for key in keys]
    assert abs(sum(held) / len(held) - 0.1) < 0.015
    assert held == [is_held_out(key, 0.1, seed=3) for key in keys]
    assert held != [is_held_out(key, 0.1, seed=4) for key in keys]
    assert not any(is_held_out(key, 0.0) for key in keys) and all(is_held_out(key, 1.0) for key in keys)


def test_the_report_shows_a_preference_for_length() -> None:
    records = [
        Preference("What is it?", (), "a long answer", "short", source="human"),
        Preference("是什么？", (), "一个很长的回答", "短", source="rule"),
        Preference("是什么呢？", (), "短", "一个很长的回答", source="rule"),
        Preference("Same?", (), "abc", "abd"),
    ]
    facts = described([Judged(record, "f", line) for line, record in enumerate(records, start=1)])
    assert facts["longer_wins"] == round(2 / 3, 3)
    assert (facts["pairs"], facts["prompts"], facts["sources"]) == (4, 4, {"human": 1, "rule": 2, "-": 1})
    assert facts["languages"] == {"en": 2, "zh": 2}
