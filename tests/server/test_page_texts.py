"""The page's pure parts: texts in two languages, Markdown without HTML, saved conversations, the cookie."""

from __future__ import annotations

import json
import re
import string

import pytest

pytest.importorskip("gradio", reason="the extra `web` is not installed")

from hypothesis import given
from hypothesis import strategies as st

from chatglm.server.api_errors import APIError
from chatglm.server.page import relabel
from chatglm.server.page.access import PageAccess
from chatglm.server.page.rendering import messages, plain_markdown, status_line, typed
from chatglm.server.page.talk import Round, Talk, Variant, numbered, read_talk
from chatglm.server.page.words import ERRORS, WORDS, error_text, word


@pytest.mark.parametrize("key", [*WORDS, *ERRORS])
def test_every_text_is_there_in_both_languages_with_the_same_places(key):
    english, chinese = WORDS.get(key) or ERRORS[key]
    places = [
        sorted(field for _, field, _, _ in string.Formatter().parse(text) if field) for text in (english, chinese)
    ]
    assert english and chinese and places[0] == places[1]
    if key not in ("top_p",):
        assert re.search(r"[\u4e00-\u9fff]", chinese) and not re.search(r"[\u4e00-\u9fff]", english)


def test_the_switch_of_languages_reaches_every_text_that_has_a_component():
    switched = {key for _, key in relabel.LABELS} | set(relabel.VALUES) | {key for _, key in relabel.HINTS}
    made_anew = {"tags", "thumb_up", "thumb_down", *(key for key in WORDS if key.startswith("tag_"))}
    said_by_events = set(WORDS) - switched - made_anew
    assert said_by_events == {
        "title", "untitled", "temperature_hint", "previous", "next", "no_store", "saved", "deleted", "needs_consent",
        "needs_opinion", "needs_answer", "needs_question", "failed", "status", "dropped", "cut", "stopped", "ask_key",
        "wrong_key", "unreachable", "no_answer", "rated", "busy", "empty_answer", "waiting",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>x</b>", "&lt;b>x&lt;/b>"),
        ("a < b and a<3", "a < b and a<3"),
        ("`<b>` <i>", "`<b>` &lt;i>"),
        ("```html\n<b>\n```\n<i>", "```html\n<b>\n```\n&lt;i>"),
        ("```\n<b> is not closed", "```\n<b> is not closed"),
        ("~~~\n<b>\n~~~\n<i>", "~~~\n<b>\n~~~\n&lt;i>"),
        ("``a ` <b>`` <i>", "``a ` <b>`` &lt;i>"),
        ("`` <b> ` <i> `", "`` &lt;b> ` <i> `"),
        ("````\n```\n<b>\n````\n<i>", "````\n```\n<b>\n````\n&lt;i>"),
        ("```x``` <b>", "```x``` &lt;b>"),
        ("\\`<b>`", "\\`&lt;b>`"),
        ("`a\n\n<b>`", "`a\n\n&lt;b>`"),
        ("`a\n<b>`", "`a\n<b>`"),
        ("\u2028```\u2028<b>", "\u2028```\u2028&lt;b>"),
        ("!![x](y)", "[x](y)"),
        ("![p](https://x/y.png)", "[p](https://x/y.png)"),
        ("&lt;b&gt; &amp; &", "&amp;lt;b&amp;gt; &amp;amp; &"),
        ("<!-- x --> <?php", "&lt;!-- x --> &lt;?php"),
        ("**bold** $a<b$", "**bold** $a&lt;b$"),
    ],
)
def test_tags_and_entities_are_text_outside_code_and_code_is_kept(text, shown):
    assert plain_markdown(text) == shown


@given(st.text(alphabet="<>&~!\n[ab;/$#", max_size=80))
def test_no_tag_is_left_where_there_is_no_code(text):
    shown = plain_markdown(re.sub("~{3,}", "~", text))
    assert not re.search(r"<[A-Za-z/!?]", shown) and "![" not in shown


@given(st.text(alphabet="<>`~\nab ", max_size=60))
def test_nothing_but_tags_changes(text):
    assert plain_markdown(text).replace("&lt;", "<") == text


@given(st.text(alphabet="<>&;#l tgamp/b!\n", max_size=60))
def test_an_edited_question_starts_from_what_was_typed(text):
    assert typed(plain_markdown(text)) == text


def test_a_text_full_of_marks_takes_time_in_proportion_to_its_length():
    for text in (
        "`x``y" * 50_000,
        "`" * 250_000,
        "```\n" * 60_000,
        "~~~ `\n" * 40_000,
        "<a" * 120_000,
        "&#" * 120_000,
        "\n \n`" * 60_000,
    ):
        assert len(plain_markdown(text)) >= len(text) // 2  # what backtracks would be here for hours


@given(st.lists(st.tuples(st.text(max_size=20), st.integers(0, 3)), max_size=5))
def test_a_conversation_reads_as_it_was_written_and_every_question_has_a_message_below(rounds):
    talk = Talk(
        rounds=[Round(question=q, variants=[Variant(text=str(n)) for n in range(count)]) for q, count in rounds]
    )
    assert read_talk(talk.model_dump_json()) == talk
    shown = messages(talk, "en")
    assert [m["role"] for m in shown] == ["user", "assistant"] * len(rounds)
    assert len(messages(talk, "en", is_waiting=True)) == max(0, 2 * len(rounds) - 1)


@pytest.mark.parametrize("text", ["[]", "x", '{"rounds": 1}', '{"rounds": [{}]}', '{"id": 3}', "null"])
def test_what_no_page_wrote_is_refused(text):
    with pytest.raises(APIError):
        read_talk(text)


def test_a_failed_round_is_no_part_of_the_next_prompt():
    rounds = [
        Round(question="a", variants=[Variant(text="half", error="internal_error")]),
        Round(question="b"),
        Round(question="c", variants=[Variant(text="C")]),
        Round(question="d"),
    ]
    asked = Talk(rounds=rounds).messages_of(3, "be kind")
    assert [(m["role"], m["content"]) for m in asked] == [
        ("system", "be kind"),
        ("user", "c"),
        ("assistant", "C"),
        ("user", "d"),
    ]


def test_titles_of_forks_are_numbered():
    assert [numbered("a"), numbered("a (2)"), numbered("a (b)")] == ["a (2)", "a (3)", "a (b) (2)"]


def test_the_status_line_says_what_was_left_out_and_how_it_ended():
    variant = Variant(prompt_tokens=90, completion_tokens=10, tokens_per_s=12.34, dropped_rounds=2, finish="length")
    line = status_line(variant, 128, "en")
    for part in ("12.3 tokens/s", "10 tokens", "100 of 128", "2 rounds", word("cut", "en")):
        assert part in line
    assert status_line(Variant(), 128, "en") == ""


def test_an_answer_without_a_word_is_told_once_it_is_over():
    def shown(**more):
        return messages(Talk(rounds=[Round(question="q", variants=[Variant(text=" ", **more)])]), "en")[1]["content"]

    assert shown(finish="stop") == "*empty answer*"
    assert shown() == " "  # it may still come
    assert "empty" not in shown(error="internal_error")


def test_the_model_is_named_where_there_are_several():
    variant = Variant(model="chatglm:a<b>", completion_tokens=1)
    assert status_line(variant, 128, "en", names_model=True).startswith("chatglm:a&lt;b> · ")
    assert "chatglm" not in status_line(variant, 128, "en")


def test_an_unknown_error_shows_the_apis_own_words():
    assert error_text("draining", "x", "zh") == ERRORS["draining"][1]
    assert error_text("invalid_value", "`seed` is wrong", "zh") == "`seed` is wrong"


def test_a_cookie_opens_for_its_key_until_it_ends_and_for_no_other(monkeypatch):
    access = PageAccess({"key-of-ann": "ann", "key-of-bob": "bob"}, "/chat")
    number = access.number_of_key("key-of-bob")
    assert number is not None and access.number_of_key("another") is None
    cookie = access.cookie(number, is_secure=True).split(";")[0]
    assert access.name_of_cookie(cookie) == "bob"
    assert "Secure" in access.cookie(number, is_secure=True) and "Secure" not in access.cookie(number, is_secure=False)
    assert PageAccess({"key-of-ann": "ann", "key-new": "bob"}, "/chat").name_of_cookie(cookie) is None
    assert PageAccess({}, "/chat").name_of_cookie(cookie) is None
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert access.name_of_cookie(cookie) is None


@given(st.text(max_size=60))
def test_no_cookie_header_breaks_in_or_breaks(header):
    assert PageAccess({"key-of-ann": "ann"}, "/chat").name_of_cookie(f"chatglm_page={header}") is None


def test_the_saved_form_is_plain_json_that_an_export_can_show():
    talk = Talk(title="t")
    talk.add_question("q")
    assert json.loads(talk.model_dump_json())["rounds"] == [{"question": "q", "variants": [], "chosen": 0}]
