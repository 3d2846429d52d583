"""Two replicas under Ray Serve (test 40): one is killed in the middle of a stream, another takes its place."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from chatglm.engine.placement import free_memory
from feedback_events import identity, rows
from server_process import QUESTION, ServerProcess, error_of, stream_events, until

pytest.importorskip("ray.serve")

NEEDED = 3_000_000_000
PATIENCE_S = 240.0
CHAT = "/v1/chat/completions"
LONG = {**QUESTION, "ignore_eos": True, "stream": True}

needs_memory = pytest.mark.skipif(
    (free_memory("cpu") or NEEDED) < NEEDED, reason="two replicas under Ray need 3 GB of free memory"
)


@pytest.fixture
def feedback_file(tmp_path):
    return tmp_path / "feedback.db"


@pytest.fixture
def replicated(feedback_file):
    options = ("--replicas", "2", "--kv-memory", "60MB", "--context-cache", "0", "--drain-timeout", "120")
    server = ServerProcess(*options, "--feedback-db", str(feedback_file), wait=False)
    try:
        until(lambda: "listening" in server.log or server.process.poll() is not None, "two replicas", PATIENCE_S)
        assert server.process.poll() is None, server.log
        server.wait_until_ready()
        yield server
        server.stop()
    finally:
        server.close()


def ask(server: ServerProcess, **fields) -> httpx.Response:
    """As the SDKs do: again where the server says 503 and when."""
    for _ in range(3):
        response = server.chat(max_tokens=1, **fields)
        if response.status_code != 503:
            break
        time.sleep(int(response.headers["retry-after"]))
    return response


def two_replicas(server: ServerProcess, names: set[str]) -> bool:
    response = ask(server)
    assert response.status_code == 200, response.text
    names.add(response.headers["x-replica"])
    return len(names) == 2


def opinion_is_kept(server: ServerProcess, takers: set[str], kept: list[str]) -> bool:
    """Whether both replicas have stored an opinion by now; one more is given."""
    name = f"answer-{len(kept)}"
    said = {"id": identity(name), "messages": QUESTION["messages"], "text": "a"}
    body = {"conversation": {"id": identity("talk")}, "answer": said, "rater": "browser-1", "thumb": 1}
    response = server.post("/v1/feedback", body)
    assert response.status_code == 200, response.text
    kept.append(identity(name))
    takers.add(response.headers["x-replica"])
    return len(takers) == 2


@needs_memory
@pytest.mark.slow
def test_a_killed_replica_breaks_its_stream_and_is_replaced_while_the_other_serves(replicated, feedback_file):
    server = replicated
    whole = stream_events(server.chat(stream=True))  # streaming works, and ends with [DONE]
    assert whole[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    refused = server.chat(temperature=-1)
    assert (refused.status_code, error_of(refused)["code"]) == (400, "invalid_value")
    first: set[str] = set()
    until(lambda: two_replicas(server, first), "answers of both replicas", PATIENCE_S)
    takers: set[str] = set()
    kept: list[str] = []
    until(lambda: opinion_is_kept(server, takers, kept), "feedback of both replicas", PATIENCE_S)

    lines: list[str] = []
    with (
        pytest.raises(httpx.RemoteProtocolError),
        httpx.stream("POST", server.url + CHAT, json={**LONG, "max_tokens": 900}, timeout=60) as answer,
    ):
        for line in answer.iter_lines():
            lines.append(line)
            if len(lines) == 4:
                killed = answer.headers["x-replica"]
                found = re.search(rf"replica name={killed} pid=(\d+)", server.log)
                os.kill(int(found[1]), signal.SIGKILL)
    assert killed in first and not any("[DONE]" in line or '"error"' in line for line in lines)
    survivors: set[str] = set()
    until(lambda: two_replicas(server, survivors), "another replica", PATIENCE_S)
    assert killed not in survivors and len(first & survivors) == 1

    with ThreadPoolExecutor(1) as pool:  # a drain lets a stream finish, and refuses what is new in the common shape
        running = pool.submit(server.post, CHAT, {**LONG, "max_tokens": 120})
        until(lambda: running.done() or any(has_begun(server) for _ in range(4)), "the stream", PATIENCE_S)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.status("/ready") != 200, "the drain", PATIENCE_S)
        assert running.result().status_code == 200 and "[DONE]" in running.result().text
    assert server.process.wait(PATIENCE_S) == 0
    assert sorted(answer for (answer,) in rows(feedback_file, "SELECT answer_id FROM feedback")) == sorted(kept)
    assert rows(feedback_file, "PRAGMA integrity_check") == [("ok",)]


def has_begun(server: ServerProcess) -> bool:
    """Metrics are those of the replica that answers, so several are asked."""
    return server.metric("num_requests_running") > 0


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--replicas", "none"), "from 1 to 1024"), (("--min-replicas", "2"), "--replicas auto"),
     (("--replicas", "2", "--web"), "event queue")],
    ids=str,
)  # fmt: skip
def test_bounds_that_do_not_hold_are_refused_before_anything_starts(start, options, word):
    server = start(*options, wait=False)
    assert server.process.wait(60) == 2
    log = " ".join(server.log.replace("│", " ").split())
    assert word in log and "Traceback" not in log


def test_the_server_never_imports_ray_unless_asked(start):
    server = start()
    with open(f"/proc/{server.process.pid}/maps") as maps:
        assert "/ray/" not in maps.read()
