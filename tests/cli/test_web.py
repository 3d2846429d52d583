"""`chatglm web`: an address, a page, and one line where its extra is missing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import httpx
import pytest

from chatglm.cli.serve import need_extra
from chatglm.cli.web import open_when_ready
from chatglm.errors import MissingExtraError
from command_line import environment, run


def test_the_address_is_printed_and_leads_to_the_page():
    pytest.importorskip("gradio", reason="the extra `web` is not installed")
    command = [sys.executable, "-m", "chatglm.cli", "web", "--no-browser", "--port", "0", "--dtype", "fp32"]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--threads", "1"], stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        address = next(found[1] for line in lines if (found := re.search(r"Chat: (http://\S+/chat) ", line)))
        next(line for line in lines if "listening" in line)
        page = httpx.get(address, follow_redirects=True, timeout=60)
        assert page.status_code == 200 and "chatglmPage" in page.text
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_missing_extra_is_named_with_its_cure():
    with pytest.raises(MissingExtraError) as caught:
        need_extra("web", ("no_such_package_anywhere",), "`chatglm web`")
    assert str(caught.value).count("\n") == 1
    assert 'pip install "chatglm[web]"' in str(caught.value)


@pytest.mark.parametrize("words", [["--help"], ["web", "--help"], ["data", "--help"], ["data", "feedback", "--help"]])
def test_help_imports_neither_the_page_nor_a_tensor_library(words):
    show = "print(*sys.modules, sep='\\n', file=sys.stderr)"
    code = f"import sys; from chatglm.cli import main\ntry: main()\nfinally: {show}"
    done = run(*words, program=(sys.executable, "-c", code))
    assert done.returncode == 0 and "Usage" in done.stdout
    assert not {"gradio", "fastapi", "torch", "sqlite3"} & set(done.stderr.split())


def test_a_wrong_path_or_an_open_host_is_refused_before_anything_is_loaded():
    for options, told in ((["--web-path", "no-slash"], "--web-path"), (["--host", "0.0.0.0"], "API key")):
        done = run("web", "--no-browser", *options)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_the_browser_is_opened_once_the_server_would_answer(monkeypatch):
    opened: list[str] = []
    asked: list[str] = []

    def answer(url: str, timeout: float) -> object:
        asked.append(url)
        if len(asked) < 3:
            raise OSError("not yet")
        return open("/dev/null", "rb")

    monkeypatch.setattr("urllib.request.urlopen", answer)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("webbrowser.open", opened.append)
    open_when_ready("http://127.0.0.1:1", "http://127.0.0.1:1/chat")
    assert asked == ["http://127.0.0.1:1/ready"] * 3
    assert opened == ["http://127.0.0.1:1/chat"]
