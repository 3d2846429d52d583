"""Which component starts which event, with which inputs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .events import Events
from .layout import Parts

ANY_NUMBER: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""Gradio's own queue lets everybody through; the engine's is the one that counts."""


def wire(blocks: gr.Blocks, parts: Parts, events: Events) -> None:
    """Connect everything."""
    p = parts
    every = [p.talk, p.chat, p.status, p.question, p.system, p.name, p.send, p.stop, p.regenerate, p.undo]
    every += [p.previous, p.place, p.next, p.prefer, p.talks, p.new, p.delete]
    common = [p.system, p.language, *p.sampling]

    def saved(event: Any) -> None:
        event.then(None, [p.talk], [p.talks], js="(talk) => chatglmPage.save(talk)", show_progress="hidden")

    saved(gr.on([p.send.click, p.question.submit], events.ask, [p.talk, p.question, *common], every, **ANY_NUMBER))
    p.stop.click(events.stop, None, None, **ANY_NUMBER)
