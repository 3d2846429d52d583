"""What breaks in the engine ends requests with a true reason, and the server goes on (tests 31 to 34)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from server_process import QUESTION, ServerProcess, error_of, until

LONG = {**QUESTION, "max_tokens": 20, "ignore_eos": True}


def ask_all(server: ServerProcess, bodies: list[dict]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: server.post("/v1/chat/completions", body), bodies))


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "faults",
    [{"raise_at_step": 20}, {"exit_at_step": 20}, {"hang_at_step": 20, "hang_for": 4, "hang_s": 1}],
    ids=["raises", "dies", "hangs"],
)
def test_a_broken_engine_ends_live_requests_and_is_built_again(start, faults):
    server = start(faults=faults)
    bodies = [{**LONG, "stream": stream} for stream in (False, True, False, True)]
    whole, streamed, *_ = ask_all(server, bodies)
    assert whole.status_code == 500 and error_of(whole)["code"] == "internal_error"
    if streamed.status_code == 200:
        assert '"internal_error"' in streamed.text and "[DONE]" not in streamed.text
    else:
        assert streamed.status_code == 500
    until(lambda: server.status("/ready") == 200, "a new engine")
    assert content(server.chat())
    assert server.metric("engine_restarts") == 1
    server.audit(expect_errors=True)


def test_the_fourth_failure_in_ten_minutes_ends_the_server_with_1(start):
    server = start(faults={"raise_at_step": 3, "every": True})
    for _ in range(3):
        assert server.chat().status_code == 500
        until(lambda: server.status("/ready") == 200, "a new engine")
    with suppress(httpx.HTTPError):
        assert server.chat().status_code in (500, 503)
    assert server.process.wait(60) == 1


def last_token(server: ServerProcess, text: str) -> int:
    return server.post("/tokenize", {"text": text}).json()["tokens"][-1]


def test_scores_that_are_not_finite_end_their_request_only(server, start):
    words = ["你好", "hello", "天气", "北京", "how are you", "苹果", "what is this"]
    bodies = [{**LONG, "messages": [{"role": "user", "content": word}]} for word in words]
    solo = [content(server.post("/v1/chat/completions", body)) for body in bodies]
    tokens = {"nan_token": last_token(server, "🦓"), "inf_token": last_token(server, "🦒")}
    broken = start("--context-cache", "0", faults={**tokens, "nan_at": 3})
    bad = [{**LONG, "messages": [{"role": "user", "content": word}]} for word in ("🦓", "🦒")]
    *good, nan, infinite = ask_all(broken, [*bodies, *bad])
    for failed in (nan, infinite):
        assert (failed.status_code, error_of(failed)["code"]) == (500, "non_finite_logits")
    assert [content(response) for response in good] == solo
    broken.audit(expect_errors=True)


def test_a_first_pass_without_memory_is_tried_once_more_and_others_live(server, start):
    bodies = [{**LONG, "messages": [{"role": "user", "content": word}]} for word in ("你好", "hello", "天气", "🦓")]
    solo = [content(server.post("/v1/chat/completions", body)) for body in bodies]
    short = start("--context-cache", "0", faults={"memory_token": last_token(server, "🦓"), "memory_times": 3})
    *others, hit = ask_all(short, bodies)
    assert [content(response) for response in others] == solo[:-1]
    assert (hit.status_code, error_of(hit)["code"]) == (503, "overloaded") and int(hit.headers["retry-after"]) >= 1
    assert short.metric("out_of_memory") == 2
    assert content(short.post("/v1/chat/completions", bodies[-1])) == solo[-1]  # the third time, and then its retry
    assert short.metric("out_of_memory") == 3 and short.metric("engine_restarts") == 0
    short.audit()


def test_a_small_pool_preempts_and_every_text_equals_its_solo_text(start):
    words = [f"第{i}个问题 number {i * 37}" for i in range(16)]
    bodies = [{**LONG, "max_tokens": 24, "messages": [{"role": "user", "content": word}]} for word in words]
    server = start("--context-cache", "0", faults={"pool_blocks": 18})
    solo = [content(server.post("/v1/chat/completions", body)) for body in bodies]
    assert server.metric("num_preemptions") == 0
    together = ask_all(server, bodies)
    assert [content(response) for response in together] == solo
    assert server.metric("num_preemptions") > 0
    usage = [response.json()["usage"]["completion_tokens"] for response in together]
    assert usage == [24] * 16
    refused = server.chat(max_tokens=600)
    assert (refused.status_code, error_of(refused)["code"]) == (400, "exceeds_kv_memory")
    server.audit()


def test_beyond_its_queue_the_server_refuses_and_says_so_in_ready(start):
    server = start("--max-running", "1", "--max-waiting", "2", "--context-cache", "0")
    long = {**QUESTION, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(3) as pool, httpx.Client(base_url=server.url, timeout=120) as client:
        release = threading.Event()

        def hold() -> None:
            with client.stream("POST", "/v1/chat/completions", json=long):
                release.wait(60)

        held = [pool.submit(hold)]
        until(lambda: server.metric("num_requests_running") == 1, "one running")
        held += [pool.submit(hold) for _ in range(2)]
        until(lambda: server.metric("num_requests_waiting") == 2, "two waiting")
        refused = server.chat()
        assert (refused.status_code, error_of(refused)["code"]) == (503, "overloaded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert server.status("/ready") == 503 and server.status("/health") == 200
        release.set()
    server.audit()


def test_a_request_that_waits_too_long_is_refused(start):
    server = start("--max-running", "1", "--queue-timeout", "0.5", "--context-cache", "0")
    with httpx.stream("POST", server.url + "/v1/chat/completions", json={**LONG, "max_tokens": 900, "stream": True}):
        until(lambda: server.metric("num_requests_running") == 1, "one running")
        refused = server.chat()
        assert (refused.status_code, error_of(refused)["code"]) == (503, "queue_timeout")
    server.audit()


def test_a_request_that_runs_too_long_is_ended(start):
    server = start("--request-timeout", "1", "--context-cache", "0")
    late = server.chat(max_tokens=1000, ignore_eos=True)
    assert (late.status_code, error_of(late)["code"]) == (504, "request_timeout")
    streamed = server.chat(max_tokens=1000, ignore_eos=True, stream=True)
    assert '"request_timeout"' in streamed.text and "[DONE]" not in streamed.text
    server.audit()


def test_the_same_context_again_is_not_computed_again(start):
    server = start("--context-cache", "60")
    first, second = server.chat(max_tokens=20), server.chat(max_tokens=20)
    assert content(first) == content(second)
    cached = [r.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for r in (first, second)]
    assert cached == [0, first.json()["usage"]["prompt_tokens"]]
    assert server.metric("context_cache_hits") == 1
