"""Which component starts which event, with which inputs. Events with `js` alone never reach the server."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from .events import Events, Shown
from .layout import SAMPLING, Parts, defaults
from .rating import Ratings
from .relabel import labelled, relabel

ANY_NUMBER: dict[str, Any] = {
    "concurrency_limit": None,
    "show_progress": "hidden",
    "api_visibility": "private",
    "preprocess": False,
}
"""Gradio's own queue lets everybody through; the engine's is the one that counts. Values are checked where they are
used, as the API does: Gradio's own checks would end in its words, with a traceback in the log."""
IN_BROWSER: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}


def wire(blocks: gr.Blocks, parts: Parts, events: Events, ratings: Ratings, context: int) -> None:
    """Connect everything."""
    p = parts
    view = [p.chat, p.status, p.regenerate, p.undo, p.previous, p.place, p.next, p.prefer]
    view += [p.send, p.stop, p.talks, p.new, p.delete, p.language, p.save_feedback]
    view += [p.rated, p.feedback_place, *p.opinion, p.delete_feedback]
    changed = [p.talk, *view]
    common = [p.system, p.language, p.model, *p.sampling]
    of_talk = [p.talk, p.side, p.system, p.name]
    kept = [p.talk, p.talks, p.name]

    def in_browser(event: Any, call: str, inputs: list[Any], outputs: list[Any]) -> Any:
        return event(None, inputs, outputs, js=call, **IN_BROWSER)

    def shown(event: Any) -> Any:
        """The server makes everything of the conversation in `talk`; in the end, of the last that was put there."""
        return event(events.open, [p.talk, p.language], view, trigger_mode="always_last", **ANY_NUMBER)

    def saved(event: Any) -> Any:
        """The browser saves the conversation that the server has changed."""
        return in_browser(event, "(talk, name) => chatglmPage.save(talk, name)", [p.talk, p.name], kept)

    # Conversations

    def relabelled(language: str) -> Shown:
        return relabel(p, language)

    kept_there = [p.language, p.talks, p.consent, p.rater, *of_talk, p.model, *p.sampling]
    start = in_browser(blocks.load, "(models) => chatglmPage.start(models)", [p.models], kept_there)
    labels = start.then(relabelled, [p.language], labelled(p), trigger_mode="always_last", **ANY_NUMBER)
    shown(labels.then)
    shown(in_browser(p.talks.input, "(id) => chatglmPage.open(id)", [p.talks], of_talk).then)
    shown(in_browser(p.new.click, "() => chatglmPage.fresh()", [], [p.talks, *of_talk]).then)
    shown(in_browser(p.delete.click, "(talk) => chatglmPage.remove(talk)", [p.talk], [p.talks, *of_talk]).then)
    renamed = "(talk, name) => chatglmPage.rename(talk, name)"
    for trigger in (p.rename.click, p.name.submit):
        in_browser(trigger, renamed, [p.talk, p.name], kept)
    for button, form in ((p.export_markdown, "markdown"), (p.export_json, "json")):
        in_browser(button.click, f"(talk) => {{ chatglmPage.exported(talk, '{form}'); return []; }}", [p.talk], [])
    in_browser(p.dark.click, "() => { chatglmPage.switchDark(); return []; }", [], [])
    chosen = in_browser(p.language.input, "(language) => [chatglmPage.setLanguage(language)]", [p.language], [p.talks])
    shown(chosen.then(relabelled, [p.language], labelled(p), trigger_mode="always_last", **ANY_NUMBER).then)
    in_browser(p.consent.input, "(given) => { chatglmPage.consent(given); return []; }", [p.consent], [])
    in_browser(p.model.input, "(model) => { chatglmPage.keepModel(model); return []; }", [p.model], [])
    keep = "(...settings) => { chatglmPage.keepSettings(settings); return []; }"
    in_browser(partial(gr.on, [part.change for part in p.sampling]), keep, p.sampling, [])
    standard = defaults(context)
    in_browser(p.reset.click, f"() => {json.dumps([standard[name] for name in SAMPLING])}", [], p.sampling)

    # Questions and answers

    def answered(event: Any) -> Any:
        return event(events.answer, [p.talk, *common], changed, **ANY_NUMBER)

    asked = gr.on(
        [p.send.click, p.question.submit],
        events.begin,
        [p.talk, p.question, p.system, p.language],
        changed,
        **ANY_NUMBER,
    )
    call = "(talk, name, box) => chatglmPage.asked(talk, name, box)"
    begun = in_browser(asked.success, call, [p.talk, p.name, p.question], [*kept, p.question])
    forked = p.chat.edit(events.fork, [p.talk, p.system, p.language], changed, **ANY_NUMBER)
    new = [answered(event.then) for event in (begun, saved(forked.success))]
    again = [answered(event) for event in (p.regenerate.click, p.chat.retry)]
    before = p.previous.click(events.previous, [p.talk, p.language], changed, **ANY_NUMBER)
    after = p.next.click(events.next, [p.talk, p.language], changed, **ANY_NUMBER)
    for event in (*new, *again, before, after):
        saved(event.then)
    undone = p.undo.click(events.undo, [p.talk, p.language], [*changed, p.taken], **ANY_NUMBER)
    call = "(talk, name, taken, box) => chatglmPage.undone(talk, name, taken, box)"
    in_browser(undone.success, call, [p.talk, p.name, p.taken, p.question], [*kept, p.taken, p.question])
    p.stop.click(events.stop, None, None, **ANY_NUMBER)

    if p.feedback.visible:
        wire_ratings(p, ratings, changed, saved)


def wire_ratings(p: Parts, ratings: Ratings, changed: list[Any], saved: Callable[[Any], Any]) -> None:
    """Thumbs and the rating controls; a listener alone would make Gradio show thumbs."""
    who = [p.talk, p.rated, p.language, p.rater]
    told = [*changed, p.feedback, p.feedback_status]
    liked = p.chat.like(ratings.like, [*who, p.consent], told, **ANY_NUMBER)
    kept = p.save_feedback.click(ratings.save, [*who, p.consent, *p.opinion], told, **ANY_NUMBER)
    preferred = p.prefer.click(ratings.prefer, [*who, p.consent], told, **ANY_NUMBER)
    gone = p.delete_feedback.click(ratings.delete, who, told, **ANY_NUMBER)
    for event in (liked, kept, preferred, gone):
        saved(event.then)
