"""The page as people use it, in Chromium."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import chatglm
from adapter_folders import low_rank_folder
from browser.conftest import photograph, ready
from chatglm.config import read_config
from feedback_events import rows
from server_process import ServerProcess, until

QUESTION = "#question textarea"
CONFIG = read_config(Path(chatglm.__file__).parent / "assets" / "mini" / "config.json")
STORY = "写一个很长很长的故事"
"""What the embedded model answers at temperature 0 with some 145 tokens."""

SLOW = {"step_delay": 1.0}
"""Faults that make a minute and more of them."""

NAME = "#name textarea, #name input"


def opened(page: Any, panel: str, last: str) -> None:
    """Open a panel. Gradio draws what is in it and writes its values a frame later; nobody types that fast."""
    page.locator(f"#{panel} > button").click()
    page.locator(last).wait_for(state="visible")
    frames(page)


def frames(page: Any) -> None:
    """Let the browser draw five times."""
    page.evaluate(
        "async () => { for (let n = 0; n < 5; n++)"
        " await new Promise(next => requestAnimationFrame(() => setTimeout(next))) }"
    )


def setting(page: Any, name: str, value: str) -> None:
    """A slider's or a text field's value; the panel is opened if it is not."""
    field = page.locator(f"#{name} input[type=number], #{name} textarea").first
    if not field.is_visible():
        opened(page, "settings", "#seed input, #seed textarea")
    field.fill(value)
    field.blur()


def shows(page: Any, field: str, value: str) -> None:
    """A field has its value: one in a panel that has just been opened gets it a moment later."""
    page.wait_for_function("([f, v]) => document.querySelector(f)?.value === v", arg=[field, value])


def settled(page: Any) -> None:
    """What was asked has been answered: a question that is taken empties its box and clears the status line at once."""
    page.wait_for_function(
        "() => document.querySelector('#question textarea')?.value === '' && !document.querySelector('#stop')"
        " && document.querySelector('#send') && /tokens|词元/.test(document.querySelector('#status')?.innerText)"
    )


def ask(page: Any, question: str) -> str:
    """Type, press Enter, wait; the answer."""
    page.fill(QUESTION, question)
    page.press(QUESTION, "Enter")
    settled(page)
    return page.locator("#chat .message.bot").last.inner_text()


def saved(page: Any) -> list[dict[str, Any]]:
    """The conversations in the browser's storage, newest first."""
    text = page.evaluate(
        "() => JSON.stringify(Object.keys(localStorage).filter(k => k.startsWith('chatglm.talk.'))"
        ".map(k => JSON.parse(localStorage.getItem(k))))"
    )
    return sorted(json.loads(text), key=lambda talk: -talk["used_at"])


def has_answer(talks: list[dict[str, Any]]) -> bool:
    """The newest conversation is saved with its last answer, not only with the question."""
    return bool(talks and talks[0]["rounds"][-1]["variants"])


def saved_when(page: Any, condition: Any, what: str) -> list[dict[str, Any]]:
    return until(lambda: condition(saved(page)) and saved(page), what)


@pytest.fixture
def page(web: ServerProcess, browse: Any) -> Any:
    opened = browse(web)
    setting(opened, "max-tokens", "24")
    setting(opened, "temperature", "0")
    return opened


def test_an_answer_is_streamed_with_its_speed_and_share_of_the_context(page):
    answer = ask(page, "你好")
    assert answer
    assert re.search(r"[\d.]+ tokens/s · \d+ tokens · \d+ of 1024 tokens", page.inner_text("#status"))
    assert "may be wrong" in page.inner_text("#warning")
    photograph(page, "english")


def test_a_conversation_outlives_a_reload_and_a_new_one_is_beside_it(page, web):
    first = ask(page, "hello")
    saved_when(page, has_answer, "the first conversation")
    page.reload()
    ready(page)
    page.wait_for_function("() => document.querySelectorAll('#chat .message.bot').length === 1")
    assert page.locator("#chat .message.bot").inner_text() == first
    kept = json.loads(page.evaluate("() => localStorage.getItem('chatglm.settings')"))
    assert kept[:5] == [0, 0.7, 0, 24, 1]  # and so do the settings
    page.click("#new")
    page.wait_for_function("() => document.querySelectorAll('#chat .message.bot').length === 0")
    ask(page, "another")
    assert [t["title"] for t in saved_when(page, lambda talks: len(talks) == 2, "two")] == ["another", "hello"]
    page.get_by_role("radio", name="hello").check(force=True)
    page.wait_for_function("() => document.querySelector('#chat')?.innerText.includes('hello')")
    assert page.locator("#chat .message.bot").inner_text() == first


def test_renaming_and_deleting_a_conversation(page):
    ask(page, "hello")
    saved_when(page, has_answer, "the conversation")
    opened(page, "manage", "#export-json")
    shows(page, NAME, "hello")
    page.fill(NAME, "stop")  # a word that Gradio could take for a text of its own
    page.click("#rename")
    saved_when(page, lambda talks: talks[0]["title"] == "stop", "the name")
    assert page.locator("#talks label").inner_text() == "stop"
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#delete")
    until(lambda: saved(page) == [], "the conversation to be gone")
    page.wait_for_function("() => document.querySelectorAll('#chat .message').length === 0")


class Held:
    """Events of a page that are sent to the server only when they are let go: a network that takes its time."""

    def __init__(self, page: Any) -> None:
        self.page, self.routes, self.is_open = page, [], False
        page.route("**/queue/join*", self._hold)

    def _hold(self, route: Any) -> None:
        if self.is_open:
            route.fallback()
        else:
            self.routes.append(route)

    def wait(self, count: int = 1) -> None:
        """Until so many are held."""
        until(lambda: self.page.evaluate("() => 1") and len(self.routes) >= count, "an event to be sent")

    def let_go(self) -> None:
        self.is_open = True
        for route in self.routes:
            route.fallback()


def test_what_is_typed_before_the_page_has_opened_its_conversation_stays(web, browse, page):
    ask(page, "hello")
    saved_when(page, has_answer, "the conversation")
    held = Held(page)
    page.reload()
    held.wait()
    page.fill(QUESTION, "already typed")
    opened(page, "settings", "#seed input, #seed textarea")
    page.locator("#system textarea").fill("Be brief.")
    held.let_go()
    page.wait_for_function("() => document.querySelectorAll('#chat .message.bot').length === 1")
    page.wait_for_function("() => /tokens/.test(document.querySelector('#status')?.innerText)")
    assert page.input_value("#system textarea") == "Be brief." and page.input_value(QUESTION) == "already typed"
    page.press(QUESTION, "Enter")
    (talk,) = saved_when(page, lambda talks: has_answer(talks) and len(talks[0]["rounds"]) == 2, "the second answer")
    assert talk["system"] == "Be brief." and talk["rounds"][1]["question"] == "already typed"


def test_a_question_that_is_sent_before_the_page_has_opened_is_answered(page):
    held = Held(page)
    page.reload()
    held.wait()
    page.fill(QUESTION, "so early")
    page.press(QUESTION, "Enter")
    held.wait(2)
    held.let_go()
    saved_when(page, has_answer, "the answer")
    settled(page)
    assert page.locator("#chat .message").count() == 2


@pytest.mark.parametrize(("later", "left"), [("sent and more", " and more"), ("another", "another")])
def test_what_is_typed_while_a_question_is_on_its_way_stays_in_the_box(page, later, left):
    held = Held(page)
    page.fill(QUESTION, "sent")
    page.press(QUESTION, "Enter")
    held.wait()
    page.fill(QUESTION, later)
    held.let_go()
    (talk,) = saved_when(page, has_answer, "the answer")
    assert talk["rounds"][0]["question"] == "sent"
    page.wait_for_function("() => !document.querySelector('#stop')")
    assert page.input_value(QUESTION) == left


def test_a_question_during_an_answer_waits_in_its_box_and_a_name_that_is_given_meanwhile_is_kept(browse, start_web):
    page = browse(start_web(faults=SLOW))
    setting(page, "temperature", "0")
    page.fill(QUESTION, STORY)
    page.press(QUESTION, "Enter")
    page.wait_for_function("() => /\\d+ tokens ·/.test(document.querySelector('#status')?.innerText)")
    page.fill(QUESTION, "and another")
    page.press(QUESTION, "Enter")
    page.get_by_text("not finished yet").first.wait_for()
    opened(page, "manage", "#export-json")
    shows(page, NAME, STORY)
    page.fill(NAME, "a story")
    page.click("#rename")
    saved_when(page, lambda talks: talks[0]["title"] == "a story", "the name")
    page.fill(NAME, "a longer name")
    page.click("#stop")
    (talk,) = saved_when(page, has_answer, "the answer")
    assert talk["title"] == "a story" and len(talk["rounds"]) == 1
    assert page.input_value(QUESTION) == "and another"
    assert page.input_value(NAME) == "a longer name"
    assert page.locator("#talks label").inner_text() == "a story"


def test_undo_keeps_what_is_in_the_box_already(page):
    ask(page, "take me back")
    page.fill(QUESTION, "a draft")
    page.click("#undo")
    page.wait_for_function(f"() => document.querySelector('{QUESTION}')?.value === 'take me back\\na draft'")


def test_of_two_conversations_that_are_opened_quickly_the_second_is_shown(page):
    for question in ("one", "two"):
        page.click("#new")
        page.wait_for_function("() => document.querySelectorAll('#chat .message').length === 0")
        ask(page, question)
        saved_when(page, lambda talks, title=question: has_answer(talks) and talks[0]["title"] == title, question)
    page.click("#new")
    page.wait_for_function("() => document.querySelectorAll('#chat .message').length === 0")
    held = Held(page)
    page.get_by_role("radio", name="one").check(force=True)
    held.wait()
    page.get_by_role("radio", name="two").check(force=True)
    held.let_go()
    page.wait_for_function("() => document.querySelector('#chat .message.user')?.innerText.includes('two')")
    ask(page, "three")
    talks = saved_when(page, lambda talks: has_answer(talks) and len(talks[0]["rounds"]) == 2, "the third question")
    assert [round["question"] for round in talks[0]["rounds"]] == ["two", "three"]


def test_stop_ends_the_answer_and_keeps_what_is_there(page, web):
    setting(page, "max-tokens", "900")
    setting(page, "temperature", "2")
    setting(page, "top-p", "1")
    page.fill(QUESTION, STORY)
    page.click("#send")
    page.wait_for_function("() => /\\d+ tokens ·/.test(document.querySelector('#status')?.innerText)")
    assert not page.locator("#send").is_visible()
    page.click("#stop")
    settled(page)
    (talk,) = saved_when(page, has_answer, "the conversation")
    (variant,) = talk["rounds"][0]["variants"]
    assert variant["finish"] in ("cancelled", "stop") and variant["completion_tokens"] < 900
    until(web.is_idle, "the engine to be idle")


def test_leaving_the_page_ends_the_answer(page, web):
    setting(page, "max-tokens", "900")
    setting(page, "temperature", "2")
    page.fill(QUESTION, STORY)
    page.press(QUESTION, "Enter")
    page.wait_for_function("() => /\\d+ tokens ·/.test(document.querySelector('#status')?.innerText)")
    page.goto("about:blank")
    until(web.is_idle, "the engine to be idle")


def test_regenerate_keeps_variants_to_step_through(page):
    setting(page, "temperature", "2")
    setting(page, "top-p", "1")
    first = ask(page, "hello")
    page.click("#regenerate")
    page.wait_for_function("() => document.querySelector('#place')?.innerText.trim() === '2 / 2'")
    settled(page)
    second = page.locator("#chat .message.bot").inner_text()
    assert first != second
    page.click("#previous")
    page.wait_for_function("() => document.querySelector('#place')?.innerText.trim() === '1 / 2'")
    assert page.locator("#chat .message.bot").inner_text() == first
    page.click("#next")
    page.wait_for_function("() => document.querySelector('#place')?.innerText.trim() === '2 / 2'")
    assert page.locator("#chat .message.bot").inner_text() == second
    photograph(page, "variants")


def test_a_seed_repeats_an_answer(page):
    setting(page, "temperature", "2")
    page.locator("#seed input, #seed textarea").fill("7")
    first = ask(page, "hello")
    page.click("#regenerate")
    page.wait_for_function("() => document.querySelector('#place')?.innerText.trim() === '2 / 2'")
    settled(page)
    assert page.locator("#chat .message.bot").inner_text() == first


def test_editing_a_question_forks_and_the_old_conversation_stays(page):
    ask(page, "one")
    ask(page, "two")
    page.locator("#chat .user-row").last.hover()
    page.get_by_role("button", name="Edit").last.click()
    page.locator("#chat textarea").fill("three")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_function("() => document.querySelector('#chat')?.innerText.includes('three')")
    settled(page)
    talks = saved_when(page, lambda talks: len(talks) == 2 and has_answer(talks), "the fork")
    assert [[r["question"] for r in talk["rounds"]] for talk in talks] == [["one", "three"], ["one", "two"]]
    assert talks[0]["title"] == "one (2)"


def test_undo_puts_the_question_back_into_the_box(page):
    ask(page, "take me back")
    page.click("#undo")
    page.wait_for_function(f"() => document.querySelector('{QUESTION}')?.value === 'take me back'")
    assert page.locator("#chat .message").count() == 0
    assert page.locator("#undo").is_disabled()


def test_shift_enter_starts_a_line_and_enter_sends(page):
    page.fill(QUESTION, "a")
    page.press(QUESTION, "Shift+Enter")
    page.type(QUESTION, "b")
    assert page.input_value(QUESTION) == "a\nb"
    assert page.locator("#chat .message").count() == 0
    page.press(QUESTION, "Enter")
    settled(page)


def test_the_enter_of_an_input_method_chooses_a_word_and_sends_nothing(page):
    page.focus(QUESTION)
    devtools = page.context.new_cdp_session(page)
    devtools.send("Input.imeSetComposition", {"text": "ni'hao", "selectionStart": 6, "selectionEnd": 6})
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    devtools.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
    devtools.send("Input.dispatchKeyEvent", {"type": "keyUp", **enter})
    page.evaluate(  # what Safari sends: composition has ended, the key code tells
        "() => { for (const kind of ['keydown', 'keypress', 'keyup']) document.querySelector('#question textarea')"
        ".dispatchEvent(new KeyboardEvent(kind, {key: 'Enter', keyCode: 229, bubbles: true, cancelable: true})); }"
    )
    devtools.send("Input.insertText", {"text": "你好"})
    page.wait_for_function(f"() => document.querySelector('{QUESTION}')?.value === '你好'")
    assert page.locator("#chat .message").count() == 0
    page.press(QUESTION, "Enter")  # and now the real one
    settled(page)


def shown_as(page: Any, text: str) -> Any:
    """A saved conversation whose answer is this text, as the page shows it."""
    identity = "01900000-0000-7000-8000-000000000001"
    variant = {"id": identity, "text": text, "finish": "stop", "completion_tokens": 3, "prompt_tokens": 3}
    talk = {"id": identity, "title": "t", "rounds": [{"question": text, "variants": [variant], "chosen": 0}]}
    page.evaluate(
        "([id, talk]) => { localStorage.setItem('chatglm.talk.' + id, talk);"
        " localStorage.setItem('chatglm.current', id) }",
        [identity, json.dumps(talk)],
    )
    page.reload()
    ready(page)
    page.wait_for_function("() => document.querySelectorAll('#chat .message.bot').length === 1")
    return page.locator("#chat .message.bot")


def test_markdown_code_tables_and_formulas_are_set(page):
    text = (
        "**bold**\n\n```python\nprint('<b>')\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "$a<b$ and $$\\sum_{i=1}^n i$$\n\nline one\nline two"
    )
    answer = shown_as(page, text)
    answer.locator(".katex").first.wait_for()
    assert answer.locator("strong").inner_text() == "bold"
    assert "print('<b>')" in answer.locator("pre code").inner_text()
    assert answer.locator("td").count() == 2
    assert answer.locator(".katex").count() == 2
    assert "a<b" in answer.locator(".katex annotation").first.text_content()
    photograph(page, "markdown")


def test_html_in_texts_is_shown_as_text_and_fetches_and_runs_nothing(page):
    text = (
        "<script>window.hacked=1</script> <img src=x onerror='window.hacked=1'> <b>not bold</b> "
        "<iframe src='https://evil.example/'></iframe> ![p](https://evil.example/p.png) "
        "[link](javascript:window.hacked=1) &lt;i&gt; <https://evil.example/auto>"
    )
    answer = shown_as(page, text)
    assert "<b>not bold</b>" in answer.inner_text() and "&lt;i&gt;" in answer.inner_text()
    for tag in ("script", "img", "iframe", "b"):
        assert answer.locator(tag).count() == 0, tag
    for address in answer.locator("a").evaluate_all("links => links.map(link => link.getAttribute('href'))"):
        assert not (address or "").startswith("javascript")
    assert page.evaluate("() => window.hacked") is None


@pytest.mark.parametrize(("locale", "send", "switched"), [("zh-CN", "发送", "Send"), ("de-DE", "Send", "发送")])
def test_the_language_is_the_browsers_and_can_be_switched(web, browse, locale, send, switched):
    page = browse(web, locale=locale)
    page.wait_for_function(f"() => document.querySelector('#send')?.innerText.trim() === '{send}'")
    other = "en" if send == "发送" else "zh"
    page.locator(f"#language input[value={other}]").check()
    page.wait_for_function(f"() => document.querySelector('#send')?.innerText.trim() === '{switched}'")
    page.reload()
    page.wait_for_function(f"() => document.querySelector('#send')?.innerText.trim() === '{switched}'")
    assert page.evaluate("() => document.documentElement.lang") == other


def test_dark_mode_is_the_systems_and_can_be_switched(web, browse):
    page = browse(web, color_scheme="dark", locale="zh-CN")
    is_dark = "() => document.body.classList.contains('dark')"
    assert page.evaluate(is_dark)
    photograph(page, "chinese-dark")
    page.click("#dark")
    page.wait_for_function("() => !document.body.classList.contains('dark')")
    page.reload()
    ready(page)
    assert not page.evaluate(is_dark)


@pytest.mark.parametrize("locale", ["zh-CN", "en-US"])
def test_on_a_phone_everything_is_in_reach_and_nothing_scrolls_sideways(web, browse, locale):
    page = browse(web, viewport={"width": 360, "height": 740}, locale=locale, has_touch=True, is_mobile=True)
    setting_open = page.locator("#side").evaluate("side => side.classList.contains('open')")
    assert not setting_open
    page.fill(QUESTION, "你好，请介绍一下你自己")
    page.locator("#send").tap()
    settled(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    for name in ("#question", "#send", "#regenerate", "#warning"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 740, name
    photograph(page, f"phone-{locale}")
    page.locator("#side .toggle-button").tap()
    page.wait_for_function("() => document.querySelector('#side')?.classList.contains('open')")
    page.locator("#settings > button").tap()
    page.locator("#temperature").wait_for(state="visible")
    photograph(page, f"phone-settings-{locale}")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360


def test_a_rating_needs_consent_once_and_can_be_changed_and_deleted(page, db):
    ask(page, "rate this")
    page.get_by_role("button", name="Like", exact=True).last.click()
    page.wait_for_function("() => document.querySelector('#feedback-status')?.innerText.includes('consent')")
    assert rows(db, "SELECT * FROM feedback") == []
    page.locator("#delete-feedback").wait_for()
    frames(page)
    photograph(page, "consent")
    page.locator("#consent input").check()
    page.locator("#rating input").nth(3).check()
    page.fill("#correction textarea", "a better answer")
    page.locator("#tags input").first.check()
    page.click("#save-feedback")
    page.wait_for_function("() => document.querySelector('#feedback-status')?.innerText.includes('Saved')")
    query = "SELECT thumb, rating, correction, tags_json FROM feedback"
    assert rows(db, query) == [(1, 4, "a better answer", '["wrong"]')]
    photograph(page, "feedback")
    (rater,) = rows(db, "SELECT rater FROM feedback")
    assert re.fullmatch(r"browser-[0-9a-f]{32}", rater[0])
    page.get_by_role("button", name="Dislike", exact=True).last.click()
    until(lambda: rows(db, query) == [(-1, 4, "a better answer", '["wrong"]')], "the other thumb, without asking again")
    page.reload()
    ready(page)
    opened(page, "feedback", "#delete-feedback")
    page.wait_for_function("() => document.querySelector('#correction textarea')?.value === 'a better answer'")
    page.click("#delete-feedback")
    until(lambda: rows(db, query) == [], "the rating to be gone")
    until(lambda: saved(page)[0]["rounds"][0]["variants"][0]["opinion"] is None, "the browser's copy to be gone")


def test_the_conversation_is_exported_as_markdown_and_json(page, tmp_path):
    answer = ask(page, "export me")
    page.locator("#manage > button").click()
    found = {}
    for form in ("markdown", "json"):
        with page.expect_download() as download:
            page.click(f"#export-{form}")
        target = tmp_path / download.value.suggested_filename
        download.value.save_as(target)
        found[form] = target
    assert found["markdown"].name == "export-me.md"
    text = found["markdown"].read_text(encoding="utf-8")
    assert text.startswith("# export me\n\n## Question\n\nexport me\n\n## Answer\n\n") and answer in text
    talk = json.loads(found["json"].read_text(encoding="utf-8"))
    assert talk["rounds"][0]["question"] == "export me" and talk["rounds"][0]["variants"][0]["sampling"]


def test_the_system_instruction_goes_with_the_question_and_defaults_come_back(page):
    page.locator("#system textarea").fill("Be brief.")
    ask(page, "hello")
    (talk,) = saved_when(page, has_answer, "the conversation")
    assert talk["system"] == "Be brief." and talk["rounds"][0]["variants"][0]["system"] == "Be brief."
    page.click("#reset")
    page.wait_for_function("() => document.querySelector('#temperature input[type=number]')?.value === '0.95'")
    assert page.input_value("#max-tokens input[type=number]") == "256"


def test_a_full_storage_is_told_and_the_page_goes_on(page):
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') } }"
    )
    assert ask(page, "hello")
    page.wait_for_function("() => document.querySelector('#page-note')?.innerText.includes('full')")


def test_a_conversation_that_is_too_large_for_the_server_is_told(page):
    identity = "01900000-0000-7000-8000-000000000002"
    talk = json.dumps({"id": identity, "title": "large", "rounds": [{"question": "x" * 1_200_000, "variants": []}]})
    page.evaluate(
        "([id, talk]) => { localStorage.setItem('chatglm.talk.' + id, talk);"
        " localStorage.setItem('chatglm.current', id) }",
        [identity, talk],
    )
    page.reload()
    page.wait_for_function("() => document.querySelector('#page-note')?.innerText.includes('too large')")
    page.click("#new")
    assert ask(page, "hello")


def test_keyboard_reaches_everything_and_controls_have_names(page):
    ask(page, "hello")
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('button, textarea, input')].filter(e => e.offsetParent"
        " && !(e.innerText || e.getAttribute('aria-label') || e.title))"
        ".filter(e => !(e.labels && [...e.labels].some(label => label.innerText)))"
        ".map(e => e.outerHTML.slice(0, 120))"
    )
    assert unnamed == []
    page.focus(QUESTION)
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") == "send"


def test_a_server_that_is_gone_is_told_in_words(browse, start_web):
    server = start_web()
    page = browse(server)
    server.process.kill()
    server.process.wait()
    page.fill(QUESTION, "is anybody there?")
    page.press(QUESTION, "Enter")
    page.wait_for_function("() => document.querySelector('#page-note')?.innerText.includes('cannot be reached')")
    photograph(page, "lost")


def test_a_server_that_dies_in_an_answer_loses_no_question_and_the_page_comes_back_with_it(browse, start_web):
    server = start_web(faults=SLOW)
    page = browse(server)
    setting(page, "temperature", "0")
    page.fill(QUESTION, STORY)
    page.press(QUESTION, "Enter")
    page.wait_for_function("() => /\\d+ tokens ·/.test(document.querySelector('#status')?.innerText)")
    server.process.kill()
    server.process.wait()
    page.wait_for_function("() => document.querySelector('#page-note')?.innerText.includes('cannot be reached')")
    photograph(page, "died")
    start_web("--port", str(server.port))
    page.wait_for_function("() => document.querySelector('#chat')?.innerText.includes('no answer')")
    ready(page)
    setting(page, "max-tokens", "4")
    page.click("#regenerate")
    (talk,) = saved_when(page, has_answer, "the answer")
    assert talk["rounds"][0]["question"] == STORY


def test_a_model_is_chosen_and_kept(browse, start_web, tmp_path):
    loud = low_rank_folder(tmp_path / "loud", CONFIG, seed=2, size=0.3)
    page = browse(start_web("--adapter", f"loud={loud}"))
    setting(page, "max-tokens", "8")
    page.locator("#model input").click()
    page.get_by_role("option", name="chatglm:loud").click()
    page.reload()
    ready(page)
    shows(page, "#model input", "chatglm:loud")
    page.fill(QUESTION, "hello")
    page.press(QUESTION, "Enter")
    (talk,) = saved_when(page, has_answer, "the answer")
    assert talk["rounds"][0]["variants"][0]["model"] == "chatglm:loud"
    page.get_by_text("chatglm:loud ·").wait_for()
    photograph(page, "model")


def test_without_adapters_there_is_no_choice_of_models(page):
    assert page.locator("#model").count() == 0 or not page.locator("#model").is_visible()


def test_with_a_key_the_page_asks_once(browse, start_web):
    server = start_web("--api-key", "ann:correct-horse-1")
    page = browse(server, wait=False, locale="zh-CN")
    photograph(page, "key")
    page.fill("#key", "wrong-key-1")
    page.get_by_role("button").click()
    page.wait_for_function("() => document.querySelector('#told')?.innerText === '密钥不正确。'")
    page.fill("#key", "correct-horse-1")
    page.get_by_role("button").click()
    ready(page)
    setting(page, "max-tokens", "2")
    assert ask(page, "hello") is not None
    page.reload()
    ready(page)  # it is not asked again
    assert page.evaluate("() => document.cookie") == ""  # scripts cannot read it
