"""The page's choice among the base and the adapters beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the extra `web` is not installed")

import chatglm
from adapter_folders import low_rank_folder
from chatglm.config import read_config
from feedback_events import rows
from page_client import PageClient
from server_process import served

CONFIG = read_config(Path(chatglm.__file__).parent / "assets" / "mini" / "config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def web(folder):
    loud = low_rank_folder(folder / "loud", CONFIG, seed=2, size=0.3)
    with served("--web", "--feedback-db", str(folder / "feedback.db"), "--adapter", f"loud={loud}") as server:
        yield server


@pytest.fixture
def page(web):
    opened = PageClient(web)
    opened.values |= {"temperature": 0, "max-tokens": 8}
    yield opened
    opened.close()


def test_the_base_is_chosen_first_and_every_adapter_can_be(page):
    assert page.props["model"]["visible"] is True and page.values["model"] == "chatglm"
    assert [value for _, value in page.props["model"]["choices"]] == ["chatglm", "chatglm:loud"]


def test_each_model_answers_as_the_api_does_and_is_named_with_its_answer(page, web):
    said = {}
    page.ask("hello")
    page.values["model"] = "chatglm:loud"
    page.press("regenerate")
    for variant in page.talk["rounds"][0]["variants"]:
        said[variant["model"]] = variant["text"]
        assert (
            variant["text"]
            == web.chat(model=variant["model"], messages=[{"role": "user", "content": "hello"}]).json()["choices"][0][
                "message"
            ]["content"]
        )
    assert set(said) == {"chatglm", "chatglm:loud"} and len(set(said.values())) == 2
    assert page.values["status"].startswith("chatglm:loud · ")
    page.press("previous")
    assert page.values["status"].startswith("chatglm · ")


def test_what_is_said_about_answers_is_stored_with_their_models(page, folder):
    page.values["consent"] = True
    page.ask("hello")
    page.values["model"] = "chatglm:loud"
    page.press("regenerate")
    page.press("prefer")
    found = rows(folder / "feedback.db", "SELECT model, variant FROM answer ORDER BY variant")
    assert found == [("chatglm", 0), ("chatglm:loud", 1)]


def test_a_model_that_is_not_served_is_told_in_words_and_the_page_goes_on(page):
    page.values["model"] = "chatglm:gone"
    page.ask("hello")
    (variant,) = page.talk["rounds"][0]["variants"]
    assert "chatglm:gone" in variant["error"] and "served: chatglm, chatglm:loud" in variant["error"]
    page.values["model"] = "chatglm"
    page.press("regenerate")
    assert page.talk["rounds"][0]["variants"][1]["text"]
