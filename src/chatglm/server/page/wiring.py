"""Which component starts which event, with which inputs. Events with `js` alone never reach the server."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from .events import Events, Shown
from .layout import SAMPLING, Parts, defaults
from .rating import Ratings
from .relabel import labelled, relabel

ANY_NUMBER: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""Gradio's own queue lets everybody through; the engine's is the one that counts."""
IN_BROWSER: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}


def wire(blocks: gr.Blocks, parts: Parts, events: Events, ratings: Ratings, context: int) -> None:
    """Connect everything."""
    p = parts
    view = [p.talk, p.chat, p.status, p.system, p.name, p.regenerate, p.undo, p.previous, p.place, p.next, p.prefer]
    view += [p.send, p.stop, p.talks, p.new, p.delete, p.rated, p.language, p.save_feedback]
    rating_view = [p.feedback_place, *p.opinion, p.delete_feedback]
    common = [p.system, p.language, *p.sampling]

    def in_browser(event: Any, call: str, inputs: list[Any], outputs: list[Any]) -> Any:
        return event(None, inputs, outputs, js=call, **IN_BROWSER)

    def shown(event: Any) -> Any:
        """The server makes everything of the conversation that the browser has put into `talk`."""
        opened = event(events.open, [p.talk, p.language], view, **ANY_NUMBER)
        return opened.then(ratings.show, [p.talk, p.rated, p.language], rating_view, **ANY_NUMBER)

    def saved(event: Any) -> Any:
        """The browser saves the conversation that the server has changed."""
        kept = in_browser(event.then, "(talk) => chatglmPage.save(talk)", [p.talk], [p.talks])
        return kept.then(ratings.show, [p.talk, p.rated, p.language], rating_view, **ANY_NUMBER)

    # Conversations

    def relabelled(language: str) -> Shown:
        return relabel(p, language)

    kept_there = [p.language, p.talk, p.talks, p.consent, p.rater, p.side, *p.sampling]
    start = in_browser(blocks.load, "() => chatglmPage.start()", [], kept_there)
    labels = start.then(relabelled, [p.language], labelled(p), **ANY_NUMBER)
    shown(labels.then)
    shown(in_browser(p.talks.input, "(id) => chatglmPage.open(id)", [p.talks], [p.talk, p.side]).then)
    shown(in_browser(p.new.click, "() => chatglmPage.fresh()", [], [p.talk, p.talks, p.side]).then)
    shown(in_browser(p.delete.click, "(talk) => chatglmPage.remove(talk)", [p.talk], [p.talk, p.talks]).then)
    renamed = "(talk, name) => chatglmPage.rename(talk, name)"
    for trigger in (p.rename.click, p.name.submit):
        in_browser(trigger, renamed, [p.talk, p.name], [p.talk, p.talks])
    for button, form in ((p.export_markdown, "markdown"), (p.export_json, "json")):
        in_browser(button.click, f"(talk) => {{ chatglmPage.exported(talk, '{form}'); return []; }}", [p.talk], [])
    in_browser(p.dark.click, "() => { chatglmPage.switchDark(); return []; }", [], [])
    chosen = in_browser(p.language.input, "(language) => [chatglmPage.setLanguage(language)]", [p.language], [p.talks])
    shown(chosen.then(relabelled, [p.language], labelled(p), **ANY_NUMBER).then)
    in_browser(p.consent.input, "(given) => { chatglmPage.consent(given); return []; }", [p.consent], [])
    keep = "(...settings) => { chatglmPage.keepSettings(settings); return []; }"
    in_browser(partial(gr.on, [part.change for part in p.sampling]), keep, p.sampling, [])
    standard = defaults(context)
    p.reset.click(lambda: [standard[name] for name in SAMPLING], [], p.sampling, **ANY_NUMBER)

    # Questions and answers

    def answered(event: Any) -> Any:
        return event(events.answer, [p.talk, *common], view, **ANY_NUMBER)

    asked = gr.on(
        [p.send.click, p.question.submit],
        events.begin,
        [p.talk, p.question, p.system, p.language],
        [*view, p.question],
        **ANY_NUMBER,
    )
    forked = p.chat.edit(events.fork, [p.talk, p.system, p.language], view, **ANY_NUMBER)
    keep = "(talk) => chatglmPage.save(talk)"
    new = [answered(in_browser(event.success, keep, [p.talk], [p.talks]).then) for event in (asked, forked)]
    again = [answered(event) for event in (p.regenerate.click, p.chat.retry)]
    undone = p.undo.click(events.undo, [p.talk, p.language], [*view, p.question], **ANY_NUMBER)
    before = p.previous.click(events.previous, [p.talk, p.language], view, **ANY_NUMBER)
    after = p.next.click(events.next, [p.talk, p.language], view, **ANY_NUMBER)
    for event in (*new, *again, undone, before, after):
        saved(event)
    p.stop.click(events.stop, None, None, **ANY_NUMBER)

    if p.feedback.visible:
        wire_ratings(p, ratings, view, saved)


def wire_ratings(p: Parts, ratings: Ratings, view: list[Any], saved: Callable[[Any], Any]) -> None:
    """Thumbs and the rating controls; a listener alone would make Gradio show thumbs."""
    who = [p.language, p.rater, p.consent]
    told = [*view, p.feedback, p.feedback_status, p.thumb]
    liked = p.chat.like(ratings.like, [p.talk, *who], told, **ANY_NUMBER)
    kept = p.save_feedback.click(ratings.save, [p.talk, p.rated, *who, *p.opinion], told, **ANY_NUMBER)
    preferred = p.prefer.click(ratings.prefer, [p.talk, *who], told, **ANY_NUMBER)
    gone = p.delete_feedback.click(ratings.delete, [p.talk, p.rated, p.language, p.rater], told, **ANY_NUMBER)
    for event in (kept, preferred, gone):
        saved(event)
    liked.then(None, [p.talk], [p.talks], js="(talk) => chatglmPage.save(talk)", **IN_BROWSER)
