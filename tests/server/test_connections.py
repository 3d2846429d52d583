"""Clients that leave, stall or send slowly (tests 26 to 30 and 40): the engine does not work for them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from server_process import QUESTION, ServerProcess, until

LONG = {**QUESTION, "max_tokens": 900, "ignore_eos": True}


def request_bytes(body: dict, **more: str) -> bytes:
    raw = json.dumps(body).encode()
    headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(raw)), **more}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + raw


def open_request(server: ServerProcess, body: dict) -> socket.socket:
    link = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    link.sendall(request_bytes(body))
    return link


def no_more_tokens(server: ServerProcess) -> None:
    """Nothing runs, and no token is made any more."""
    until(lambda: server.metric("num_requests_running") == 0, "no running request")
    made = server.metric("generation_tokens")
    time.sleep(0.3)
    assert server.metric("generation_tokens") == made


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_is_not_computed_for(server, stream):
    made = server.metric("generation_tokens")
    with open_request(server, {**LONG, "stream": stream}) as link:
        until(lambda: server.metric("generation_tokens") > made + 2, "some tokens")
        if stream:
            link.recv(100)
    no_more_tokens(server)
    assert server.metric("generation_tokens") < made + 600
    until(lambda: "finish=cancelled" in server.log, "one log line")


def test_all_choices_of_a_client_that_leaves_are_cancelled(server):
    made = server.metric("generation_tokens")
    with open_request(server, {**LONG, "n": 4, "temperature": 1}):
        until(lambda: server.metric("generation_tokens") > made + 2, "some tokens")
    no_more_tokens(server)


def test_a_queued_client_that_leaves_is_never_computed(start):
    server = start("--max-running", "1", "--context-cache", "0")
    with open_request(server, {**LONG, "stream": True}) as first:
        first.recv(100)
        queued = [open_request(server, {**LONG, "messages": [{"role": "user", "content": "hello"}]}) for _ in range(3)]
        until(lambda: server.metric("num_requests_waiting") == 3, "three in the queue")
        prompts = server.metric("prompt_tokens")
        for link in queued:
            link.close()
        until(lambda: server.metric("num_requests_waiting") == 0, "an empty queue")
        assert server.metric("prompt_tokens") == prompts
    server.audit()


def test_a_client_that_leaves_during_its_prefill_is_dropped_at_the_next_slice(start):
    server = start("--context-cache", "0", "--prefill-budget", "400", faults={"step_delay": 0.15})
    long = [{"role": "user", "content": "很长的一段话，" * 120}]
    made = server.metric("generation_tokens")
    with open_request(server, {**LONG, "messages": long, "max_tokens": 8}):
        until(lambda: server.metric("num_requests_running") == 1, "its admission")
    until(lambda: server.metric("num_requests_running") == 0, "its end")
    assert server.metric("generation_tokens") == made
    server.audit()


def test_a_client_that_leaves_between_admission_and_prefill_is_never_computed(start):
    server = start("--context-cache", "0", "--prefill-budget", "300", faults={"step_delay": 0.3})
    texts = ["很长的一段话，" * 60, "另外一段话。" * 150]
    bodies = [{**QUESTION, "messages": [{"role": "user", "content": text}], "max_tokens": 4} for text in texts]
    with open_request(server, {**bodies[0], "ignore_eos": True}) as first:
        until(lambda: server.metric("num_requests_running") == 1, "the first one's admission")
        with open_request(server, bodies[1]):
            until(lambda: server.metric("num_requests_running") == 2, "the second one's admission")
            assert server.metric("generation_tokens") == 0  # the first one's pass is not over
        first.settimeout(60)
        assert b" 200 " in first.recv(65536)
    until(lambda: server.metric("num_requests_running") == 0, "the end")
    prompts = [server.post("/tokenize", {"messages": body["messages"], "add_special": True}) for body in bodies]
    lengths = [prompt.json()["count"] for prompt in prompts]
    assert lengths[0] + 3 <= server.metric("iteration_tokens_total_sum") < lengths[0] + 10 < sum(lengths)
    server.audit()


def test_a_reader_that_takes_nothing_is_cancelled_and_others_go_on(start):
    server = start("--context-cache", "0", "--max-running", "64")
    body = {**LONG, "n": 16, "stream": True, "logprobs": True, "top_logprobs": 20, "temperature": 1, "max_tokens": 1000}
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect(("127.0.0.1", server.port))
    with slow:
        slow.sendall(request_bytes(body))
        until(lambda: server.metric("generation_tokens") > 50, "some tokens")
        assert server.chat().status_code == 200
        until(lambda: server.metric("num_requests_running") == 0, "its cancellation", 300)
        assert server.metric("generation_tokens") < 16 * 990
    until(lambda: "finish=cancelled" in server.log, "the log line")
    assert server.metric("request_success") == 2  # one each for the slow one and the other
    server.audit()


def test_a_killed_client_with_open_streams_leaves_nothing(server):
    code = (
        "import socket, sys, time, json\n"
        f"raw = {request_bytes({**LONG, 'stream': True})!r}\n"
        f"links = [socket.create_connection(('127.0.0.1', {server.port})) for _ in range(8)]\n"
        "[link.sendall(raw) for link in links]; [link.recv(100) for link in links]\n"
        "print('open', flush=True); time.sleep(600)"
    )
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert client.stdout is not None and client.stdout.readline() == b"open\n"
    assert server.metric("num_requests_running") == 8
    client.kill()
    client.wait()
    client.stdout.close()
    no_more_tokens(server)


def test_a_killed_server_breaks_streams_and_starts_again_on_its_port(start):
    server = start()
    port = server.port
    links = [open_request(server, {**LONG, "stream": True}) for _ in range(8)]
    for link in links:
        link.recv(100)
    os.kill(server.process.pid, signal.SIGKILL)
    for link in links:
        rest = b""
        try:
            while part := link.recv(65536):
                rest += part
        except ConnectionError:
            pass
        assert b"[DONE]" not in rest
        link.close()
    again = start("--port", str(port))
    assert again.chat().status_code == 200


def test_slow_senders_are_cut_off_and_others_are_served(start):
    server = start("--read-timeout", "1")
    slow_heads = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    slow_bodies = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    for link in slow_heads:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
    for link in slow_bodies:
        link.sendall(request_bytes(QUESTION)[:-10])
    assert server.chat().status_code == 200
    for link in slow_heads:
        link.settimeout(30)
        assert link.recv(100) == b""  # closed
        link.close()
    for link in slow_bodies:
        link.settimeout(30)
        assert b" 408 " in link.recv(1000)
        link.close()
    server.audit()


def test_a_thousand_connections_are_accepted_and_given_back(start):
    server = start("--max-waiting", "1000", "--read-timeout", "60")
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(500)]
    half = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(300)]
    for link in half:
        link.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
    statuses: list[int] = []

    def ask(client: httpx.Client) -> None:
        body = {**QUESTION, "max_tokens": 2}
        statuses.append(client.post("/v1/chat/completions", json=body).status_code)

    # a connection for each: one that is kept for re-use may be closed by the server in the moment it is used again
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    with httpx.Client(base_url=server.url, timeout=300, limits=limits) as client:
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [200] * 200
    for link in [*idle, *half]:
        link.close()
    server.audit()
