"""Formats: what each object becomes, and what is said about those that become nothing."""

from __future__ import annotations

from typing import Any

import pytest

from chatglm.training.data.formats import BadRecordError, Columns, Dialogue, Preference, Text, parse

ONE = (("q", "a"),)
TWO = (("q", "a"), ("q2", "a2"))


@pytest.mark.parametrize(
    ("found", "record"),
    [
        ({"prompt": "q", "response": "a"}, Dialogue(ONE)),
        ({"prompt": "q2", "response": "a2", "history": [["q", "a"]]}, Dialogue(TWO, has_history=True)),
        ({"prompt": "q", "response": "a", "history": []}, Dialogue(ONE, has_history=True)),
        ({"content": "q", "summary": "a"}, Dialogue(ONE)),
        ({"question": "q", "answer": "a", "source": "s"}, Dialogue(ONE, source="s")),
        ({"turns": [["q", "a"], ["q2", "a2"]], "source": "s"}, Dialogue(TWO, source="s")),
        ({"instruction": "q", "output": "a"}, Dialogue(ONE)),
        ({"instruction": "q", "input": "", "output": "a"}, Dialogue(ONE)),
        ({"instruction": "do", "input": "this", "output": "a"}, Dialogue((("do\nthis", "a"),))),
        (
            {"instruction": "q2", "input": "", "output": "a2", "history": [["q", "a"]], "system": "s"},
            Dialogue(TWO, system="s", has_history=True),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            Dialogue(ONE),
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
                ]
            },
            Dialogue(ONE, system="s"),
        ),
        ({"text": "t"}, Text("t")),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, Preference("q", (), "a", "b")),
        (
            {"prompt": "q", "history": [["x", "y"]], "chosen": "a", "rejected": "b", "margin": 0.5, "source": "human"},
            Preference("q", (("x", "y"),), "a", "b", 0.5, "human"),
        ),
        ({"prompt": "q", "response": "a", "original": "b"}, Preference("q", (), "a", "b", label="correction")),
        ({"prompt": "q", "answer": "a", "score": -1}, Preference("q", (), "a", "", score=-1)),
    ],
)
def test_every_format_is_told_by_its_keys(found: dict[str, Any], record: object) -> None:
    assert parse(found) == record


def test_fields_of_an_own_format_are_named() -> None:
    columns = Columns("ask", "say", "past")
    assert parse({"ask": "q2", "say": "a2", "past": [["q", "a"]]}, columns) == Dialogue(TWO, has_history=True)
    with pytest.raises(BadRecordError, match="there is no `say`; found ask, text"):
        parse({"ask": "q", "text": "t"}, columns)


@pytest.mark.parametrize(
    ("found", "kind", "message"),
    [
        ([1, 2], "json", "a JSON list, not an object"),
        ({"promt": "q", "response": "a"}, "keys", "has the keys `promt`, `response`; `promt` may mean `prompt`"),
        ({"prompt": "q", "response": 3}, "keys", "`response` is 3, not a string"),
        ({"prompt": "q", "response": "a", "history": [["x"]]}, "keys", "entry 1 of `history` is ['x']"),
        ({"prompt": "q", "response": " \n"}, "empty", "the answer is blank"),
        ({"turns": [["q", "a"], ["", "a"]]}, "empty", "the question of round 2 is blank"),
        ({"turns": []}, "empty", "the dialogue has no round"),
        ({"text": "  "}, "empty", "the text is blank"),
        ({"messages": [{"role": "user", "content": "q"}]}, "roles", "ends with a question that has no answer"),
        (
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]},
            "roles",
            "message 1 of `messages` is by the assistant, where a question belongs",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "roles", "is by `tool`; known: human, user"),
        ({"messages": [{"role": "user"}]}, "keys", "entry 1 of `messages` is {'role': 'user'}"),
        ({"prompt": "q", "answer": "a", "score": 5}, "keys", "`score` is 5; it must be 1 or -1"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "much"}, "keys", "`margin` is 'much'"),
    ],
)
def test_what_is_wrong_is_said(found: object, kind: str, message: str) -> None:
    with pytest.raises(BadRecordError) as error:
        parse(found)
    assert error.value.kind == kind
    assert message in str(error.value)
