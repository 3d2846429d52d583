"""`chatglm web`: the chat page, in a browser on this machine."""

from __future__ import annotations

import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from typing import Annotated

import typer

from ..errors import RequestError
from .options import CommonOptions, PlacementOptions, Source
from .serve import SERVING, need_extra, run
from .serve_options import LimitOptions, ListenOptions

PATIENCE_S = 120.0


def web(
    source: Source = None,
    *,
    listen: ListenOptions,
    web_path: Annotated[str, typer.Option("--web-path", help="Where the page is", envvar="CHATGLM_WEB_PATH")] = "/chat",
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address, open nothing")] = False,
    placement: PlacementOptions,
    common: CommonOptions,
) -> None:
    """Chat in a browser. The page and the API of `chatglm serve` run until Ctrl-C; nothing leaves this machine.

    Conversations stay in the browser. With --feedback-db FILE, answers can be rated and corrected.

    Try: chatglm web
    """
    need_extra("web", (*SERVING, "gradio"), "`chatglm web`")
    if placement.devices > 1:
        raise typer.BadParameter("the page runs on one device", param_hint="--devices")
    try:
        settings = listen.settings(LimitOptions(), enable_faults=False, web=True, web_path=web_path)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error

    def tell(url: str) -> None:
        page = url + web_path
        print(f"Chat: {page}   (Ctrl-C ends it)", file=sys.stderr)
        if not no_browser:
            threading.Thread(target=open_when_ready, args=(url, page), daemon=True).start()

    run(settings, source, placement, common.terminal(), tell)


def open_when_ready(url: str, page: str) -> None:
    """The browser is opened once the server would answer, so that it never shows an error first."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url + "/ready", timeout=5):
                webbrowser.open(page)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
