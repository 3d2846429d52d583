"""64 clients at once: every reply is that request's own (invariants I1 to I3)."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor

import httpx

from server_process import stream_events

WORDS = [
    "你好",
    "hello, who are you?",
    "今天天气怎么样",
    "北京是哪里",
    "tell me a story",
    "苹果是什么",
    "1+1=?",
    "再见",
]


def body_of(number: int, marker: str) -> dict:
    question = f"{marker} {WORDS[number % len(WORDS)]}" + " 请回答。" * (number % 5)
    fields = {"temperature": 0} if number % 3 else {"temperature": 1.2, "top_p": 0.95, "seed": number}
    return {
        "model": "chatglm",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 6 + number % 11,
        "stream": number % 2 == 0,
        "n": 2 if number % 10 == 0 else 1,
        "logprobs": True,
        **fields,
    }


def read(body: dict, response: httpx.Response) -> dict:
    """Texts, tokens and counts of an answer, stream or not."""
    assert response.status_code == 200, response.text
    count = body["n"]
    if not body["stream"]:
        found = response.json()
        choices = found["choices"]
        return {
            "texts": [choice["message"]["content"] for choice in choices],
            "tokens": [[entry["bytes"] for entry in choice["logprobs"]["content"]] for choice in choices],
            "finish": [choice["finish_reason"] for choice in choices],
            "usage": {name: found["usage"][name] for name in ("prompt_tokens", "completion_tokens")},
        }
    texts, tokens, finish = [""] * count, [[] for _ in range(count)], [""] * count
    events = stream_events(response)
    for event in events[:-1]:
        choice = event["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        tokens[choice["index"]] += [entry["bytes"] for entry in (choice["logprobs"] or {"content": []})["content"]]
        finish[choice["index"]] = choice["finish_reason"] or finish[choice["index"]]
    usage = {name: events[-1]["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    return {"texts": texts, "tokens": tokens, "finish": finish, "usage": usage}


def test_every_reply_of_64_clients_at_once_equals_its_solo_reply(server):
    markers = [f"ID-{secrets.token_hex(6)}" for _ in range(64)]
    bodies = [body_of(number, marker) for number, marker in enumerate(markers)]
    for body in bodies:
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}

    def ask(body: dict) -> httpx.Response:
        return server.post("/v1/chat/completions", body)

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, bodies))
    for number, (body, response) in enumerate(zip(bodies, together, strict=True)):
        assert read(body, response) == read(body, ask(body)), body
        others = [marker for marker in markers if marker != markers[number]]
        assert not [marker for marker in others if marker in response.text]
    assert not [marker for marker in markers if marker in server.log]
