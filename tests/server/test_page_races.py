"""What a reader types or chooses while an event of the page is on its way is the reader's."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("gradio", reason="the extra `web` is not installed")

from feedback_events import rows
from page_client import PageClient
from server_process import served, until

TYPED = {"system", "name", "question", "model", "consent", "rater", "language", "models", "side"}
SAMPLING = {"temperature", "top-p", "top-k", "max-tokens", "repetition-penalty", "seed"}
OPINION = {"thumb", "rating", "tags", "correction", "comment"}
BUSY = "not finished yet"

STORY = "写一个很长很长的故事"
"""What the embedded model answers at temperature 0 with some 145 tokens."""


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    return tmp_path_factory.mktemp("feedback") / "feedback.db"


@pytest.fixture(scope="module")
def web(db):
    with served("--web", "--feedback-db", str(db)) as server:
        yield server


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A server whose answer to STORY takes half a minute."""
    file = tmp_path_factory.mktemp("slow") / "feedback.db"
    with served("--web", "--feedback-db", str(file), faults={"step_delay": 0.2}) as server:
        yield server


@pytest.fixture
def page(web):
    opened = PageClient(web)
    opened.values |= {"max-tokens": 12, "temperature": 0}
    yield opened
    opened.close()


def outputs(page, dependency):
    return {page.names.get(number) for number in dependency["outputs"]}


def test_no_answer_of_the_server_writes_what_a_reader_types(page):
    found = 0
    for dependency in page.config["dependencies"]:
        if dependency["backend_fn"] and "warning" not in outputs(page, dependency):  # that one: the labels
            found += 1
            written = outputs(page, dependency) & (TYPED | SAMPLING)
            assert written <= {"language"}, (dependency["targets"], written)  # which is switched off, not written
    assert found > 10


def test_another_language_changes_labels_and_no_value_that_a_reader_has_given(page):
    (labels, *_) = [d for d in page.config["dependencies"] if d["backend_fn"] and "warning" in outputs(page, d)]
    before = dict(page.values)
    page.values["language"] = "zh"
    page.run(labels)
    assert page.values["send"] == "发送"
    for name in (TYPED | SAMPLING | OPINION) - {"language"}:
        assert page.values[name] == before[name], name


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 7), ("temperature", "x"), ("top-p", None), ("max-tokens", [1]), ("language", "xx"), ("model", 3)],
)
def test_values_that_no_control_gives_end_in_words_and_not_in_a_traceback(page, web, name, value):
    page.values[name] = value
    page.values["question"] = "hello"
    page.press("send")
    (variant,) = page.talk["rounds"][0]["variants"]
    assert variant["error"] or variant["text"]
    assert "Traceback" not in web.log


def test_opinions_that_no_control_gives_are_dropped(page, web):
    page.ask("hello")
    page.values |= {"thumb": "x", "rating": [9], "tags": 5, "correction": {"a": 1}, "consent": False}
    page.press("save-feedback")
    assert "Traceback" not in web.log


def test_opening_a_conversation_does_not_write_it(page):
    opening = [d for d in page.config["dependencies"] if d["backend_fn"] and "chat" in outputs(page, d)]
    opening = [d for d in opening if "talk" not in outputs(page, d) and "warning" not in outputs(page, d)]
    assert len(opening) == 5  # start, another, new, deleted, language
    assert {d["trigger_mode"] for d in opening} == {"always_last"}  # two quick choices: the second is shown


def test_an_opinion_that_is_written_during_an_answer_stays(page):
    page.ask("hello")
    page.values |= {"correction": "left over", "thumb": 1}
    typed = {"correction": "what it should have said", "thumb": -1, "rating": 2, "tags": ["wrong"], "comment": "hm"}
    came = []

    def write():
        if not came:
            assert not page.values["correction"] and page.values["thumb"] is None  # it was about the answer before
        came.append(1)
        page.values |= typed

    page.press("regenerate", meanwhile=write)
    assert len(came) > 1 and page.values["place"] == "2 / 2"
    assert {name: page.values[name] for name in typed} == typed


def test_a_thumb_without_consent_is_still_there_when_consent_is_given(page, db):
    page.ask("hello")
    page.press("chat", "like", {"index": 1, "value": "x", "liked": True})
    assert page.values["thumb"] == 1 and "consent" in page.values["feedback-status"]
    page.values |= {"consent": True, "comment": "good"}
    page.press("save-feedback")
    assert rows(db, "SELECT thumb, comment FROM feedback") == [(1, "good")]
    page.press("delete-feedback")
    assert page.values["thumb"] is None and page.values["comment"] == ""


def test_a_rating_writes_none_of_the_controls_but_those_of_another_answer(page, db):
    page.ask("one")
    page.ask("two")
    page.values |= {"consent": True, "comment": "about two"}
    page.press("chat", "like", {"index": 3, "value": "x", "liked": True})
    assert page.values["thumb"] == 1 and page.values["comment"] == "about two"
    page.press("chat", "like", {"index": 1, "value": "x", "liked": False})
    assert page.values["thumb"] == -1 and page.values["comment"] == "" and page.values["rated"] == 0
    assert "1 of 2" in page.values["feedback-place"]
    for _ in range(2):
        page.press("delete-feedback")
        page.values["rated"] = 1
    assert rows(db, "SELECT * FROM feedback") == []


@pytest.mark.parametrize(
    ("name", "kind", "data"),
    [
        ("send", "click", None),
        ("regenerate", "click", None),
        ("chat", "edit", {"index": 0, "previous_value": "hello", "value": "changed"}),
        ("undo", "click", None),
        ("previous", "click", None),
        ("save-feedback", "click", None),
        ("delete-feedback", "click", None),
        ("prefer", "click", None),
    ],
)
def test_during_an_answer_nothing_else_changes_its_conversation(slow, name, kind, data):
    page, other = two_pages(slow, f"busy{name}")
    page.begin(STORY)
    refused = 0
    for message in page.follow():
        if message["msg"] == "process_generating" and not refused:
            refused = 1
            other.start(name, kind, data)
        if message["msg"] == "process_completed" and not message["success"]:
            assert BUSY in message["output"]["error"], message
            refused = 2
            other.start("stop")
    assert refused == 2
    until(slow.is_idle, "the answer to be over")
    page.close()
    other.close()


def two_pages(server, session):
    """Two clients of one page, with a round that is no part of the next prompt."""
    pages = PageClient(server, session=session), PageClient(server, session=session)
    variants = [{"text": "hm", "error": "internal_error"}]
    for page in pages:
        page.values["talk"] = json.dumps({"rounds": [{"question": "hello", "variants": variants}]})
        page.values |= {"max-tokens": 900, "temperature": 0, "thumb": 1, "consent": True, "question": "another"}
    return pages


def test_a_thumb_during_an_answer_stores_nothing_and_says_why(slow):
    page, other = two_pages(slow, "thumbs")
    page.begin(STORY)
    told = ""
    liked = other.event("chat", "like")
    for message in page.follow():
        if message["msg"] == "process_generating" and not told:
            told = "pressed"
            other.start("chat", "like", {"index": 1, "value": "x", "liked": True})
        if message["msg"] == "process_completed" and len(message["output"]["data"]) == len(liked["outputs"]):
            other.take(liked, message["output"]["data"])
            told = other.values["feedback-status"]
            other.start("stop")
    assert BUSY in told and other.talk["rounds"][0]["variants"][0].get("opinion") is None
    until(slow.is_idle, "the answer to be over")
    page.close()
    other.close()
