"""Starting and stopping (tests 37 and 38)."""

from __future__ import annotations

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from server_process import QUESTION, error_of, until

LONG = {**QUESTION, "ignore_eos": True}


def test_sigterm_lets_running_and_waiting_requests_finish(start):
    server = start("--max-running", "4")
    bodies = [{**LONG, "max_tokens": 40, "stream": number < 4} for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(server.post, "/v1/chat/completions", body) for body in bodies]
        until(lambda: server.metric("num_requests_running") == 4, "four running")
        until(lambda: server.metric("num_requests_waiting") == 2, "two waiting")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.status("/ready") == 503, "ready says no")
        refused = server.chat()
        assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
        for body, answer in zip(bodies, answers, strict=True):
            assert answer.result().status_code == 200
            assert not body["stream"] or "[DONE]" in answer.result().text
    assert server.process.wait(60) == 0


def test_what_is_longer_than_the_drain_gets_an_ending(start):
    server = start("--drain-timeout", "1")
    with httpx.stream(
        "POST", server.url + "/v1/chat/completions", json={**LONG, "max_tokens": 1000, "stream": True}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = "\n".join(lines)
    assert '"draining"' in rest and "[DONE]" not in rest
    assert server.process.wait(60) == 0


@pytest.mark.parametrize(("sig", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(start, sig, status):
    server = start()
    with httpx.stream(
        "POST", server.url + "/v1/chat/completions", json={**LONG, "max_tokens": 1000, "stream": True}
    ) as answer:
        next(answer.iter_lines())
        server.process.send_signal(sig)
        until(lambda: server.status("/ready") == 503, "the drain")
        began = time.monotonic()
        server.process.send_signal(sig)
        assert server.process.wait(60) == status
        assert time.monotonic() - began < 20


def test_a_taken_port_is_one_line_and_status_1(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start("--port", str(port), wait=False)
        assert server.process.wait(60) == 1
        assert f"127.0.0.1:{port}" in server.log and "Traceback" not in server.log


@pytest.mark.parametrize(
    ("options", "status", "word"),
    [
        (("--host", "0.0.0.0"), 2, "--api-key-file"),
        (("--api-key-file", "/nowhere/keys.txt"), 2, "/nowhere/keys.txt"),
        (("--kv-memory", "1MiB"), 1, "--kv-memory"),
        (("--rate-limit", "many"), 2, "60/minute"),
        (("--cors-origin", "*"), 2, "exact origin"),
        (("--max-body", "x"), 2, "--max-body"),
        (("--devices", "2"), 2, "one device"),
    ],
    ids=str,
)
def test_a_bad_start_is_a_clear_message_without_a_traceback(start, options, status, word):
    server = start(*options, wait=False)
    assert server.process.wait(60) == status
    assert word in server.log.replace("\n", " ") and "Traceback" not in server.log and "listening" not in server.log


def test_faults_are_refused_without_their_flag(start, monkeypatch):
    import os
    import subprocess
    import sys

    environment = {**os.environ, "CHATGLM_FAULTS": '{"raise_at_step": 1}'}
    done = subprocess.run(
        [sys.executable, "-m", "chatglm.cli", "serve"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "--enable-faults" in done.stderr
