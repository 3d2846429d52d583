"""A real Chromium against a real server. No request leaves this machine: one that tries fails the test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the extra `web` is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")

from server_process import ServerProcess

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def chromium() -> str:
    if CHROMIUM is None:
        pytest.skip("there is no `chromium` on this machine: the page is not tested in a browser")
    return CHROMIUM


@pytest.fixture(scope="module")
def playwright(chromium: str) -> Iterator[Any]:
    """Ended with its module: while it lives, this thread has a running event loop that other tests would trip over."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feedback") / "feedback.db"


@pytest.fixture(scope="module")
def web(chromium: str, db: Path) -> Iterator[ServerProcess]:
    """One server with the page and a feedback file."""
    server = ServerProcess("--web", "--feedback-db", str(db))
    yield server
    assert server.stop() == 0
    server.close()


@pytest.fixture
def start_web(chromium: str) -> Iterator[Callable[..., ServerProcess]]:
    """Servers of one's own; they are gone after the test."""
    started: list[ServerProcess] = []

    def begin(*options: str, **more: Any) -> ServerProcess:
        started.append(ServerProcess("--web", *options, **more))
        return started[-1]

    yield begin
    for each in started:
        each.close()


@pytest.fixture
def browse(playwright: Any, chromium: str, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Open the page in a browser of its own, with an empty profile; what it asked of other hosts fails the test."""
    contexts: list[Any] = []
    elsewhere: list[str] = []
    problems: list[str] = []

    def open_page(server: ServerProcess, path: str = "/chat", *, wait: bool = True, **more: Any) -> Any:
        options = {"locale": "en-US", "viewport": {"width": 1280, "height": 860}, **more}
        profile = tmp_path / f"profile-{len(contexts)}"
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=chromium, args=ARGUMENTS, **options
        )
        contexts.append(context)
        context.set_default_timeout(180_000)

        def check(route: Any) -> None:
            if route.request.url.startswith((server.url + "/", "data:", "blob:")):
                route.continue_()
            else:
                elsewhere.append(route.request.url)
                route.abort()

        context.route("**/*", check)
        page = context.pages[0]
        page.on("pageerror", lambda error: None if _is_lost(str(error)) else problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if _is_policy(message.text) else None)
        page.goto(server.url + path)
        if wait:
            ready(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert elsewhere == []
    assert problems == []


def _is_lost(text: str) -> bool:
    """What a script throws when a test ends the server under it."""
    return "network error" in text or "Failed to fetch" in text or "Connection errored" in text


def _is_policy(text: str) -> bool:
    return "Content Security Policy" in text and "violates" in text


def ready(page: Any) -> None:
    """The page has loaded, chosen its language and shown its conversation."""
    page.wait_for_selector("#question textarea")
    page.wait_for_selector("#language input:checked")
    page.wait_for_function("document.querySelector('#undo')?.disabled !== undefined")


def photograph(page: Any, name: str) -> None:
    """Into the folder CHATGLM_SCREENSHOTS, where one is named: for looking at."""
    folder = os.environ.get("CHATGLM_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png")
