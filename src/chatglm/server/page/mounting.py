"""The page put on the server's application."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import FastAPI

from ..backend import Backend
from ..logs import RequestLog
from .access import PageAccess
from .gate import Gate

ASSETS = Path(__file__).parent


def mount_page(app: FastAPI, backend: Backend, access: PageAccess, log: RequestLog) -> Gate:
    """The application with the page at `settings.web_path`, behind its gate."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    from .answering import LiveAnswers
    from .events import Events
    from .layout import lay_out
    from .rating import Ratings
    from .wiring import wire
    from .words import PREFIX, translations

    path = backend.settings.web_path
    live = LiveAnswers()
    i18n = gr.I18n(**translations())
    with gr.Blocks(title="ChatGLM", analytics_enabled=False, fill_height=True) as blocks:
        models, with_feedback = list(backend.model_ids), backend.feedback is not None
        parts = lay_out(lambda key: i18n(PREFIX + key), backend.context, models, with_feedback=with_feedback)
        events = Events(backend, parts, live, log)
        wire(blocks, parts, events, Ratings(backend, parts, events), backend.context)
    blocks.queue(max_size=None, default_concurrency_limit=None, api_open=False)
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    gr.mount_gradio_app(
        app,
        blocks,
        path,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        i18n=i18n,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate"),
        css=(ASSETS / "page.css").read_text(encoding="utf-8"),
        allowed_paths=[],
        blocked_paths=["/"],
        max_file_size=0,
    )
    asking = (ASSETS / "asking.html").read_text(encoding="utf-8")
    return Gate(app, path, backend, live, access=access, script=script, asking=asking)
