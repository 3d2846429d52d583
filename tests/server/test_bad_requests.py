"""Bad input is refused by name, in one shape, before anything reaches the engine (docs/serving.md, tests 1 to 24)."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from contextlib import closing, suppress

import httpx
import pytest

from server_process import QUESTION, error_of, stream_events

CHAT = "/v1/chat/completions"
HEADERS = {"content-type": "application/json"}


def raw(server, body: bytes, path: str = CHAT, **headers: str) -> httpx.Response:
    return server.client.post(path, content=body, headers={**HEADERS, **headers}, timeout=60)


def refused(server, code: str, param: str | None = None, path: str = CHAT, **fields) -> dict:
    before = server.metric("prompt_tokens")
    response = server.post(path, {**QUESTION, **fields} if path == CHAT else fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["code"] == code, error
    if param is not None:
        assert error["param"] == param, error
    assert server.metric("prompt_tokens") == before
    return error


# 1, 4, 16, 20, 22


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b'{"model": "chatglm", "messages": [{"role": "us',
        b'{"model": "chatglm",}',
        b"[1, 2]",
        b'"text"',
        b"null",
        *(b'{"model": "chatglm", "temperature": %s}' % number for number in (b"NaN", b"Infinity", b"-Infinity")),
    ],
)
def test_a_body_that_is_no_json_object_is_refused_with_its_place(server, body):
    response = raw(server, body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "invalid_json"
    assert any(word in error["message"] for word in ("line", "position", "finite"))


@pytest.mark.parametrize("number", ["1e400", "9" * 10_000, "-1e999", "1." + "0" * 500])
def test_huge_numbers_are_refused_at_once(server, number):
    began = time.monotonic()
    response = raw(server, b'{"model": "chatglm", "temperature": %s}' % number.encode())
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_value")
    assert time.monotonic() - began < 5  # a hang, not a speed: nothing is computed with them


@pytest.mark.parametrize("field", ["max_tokens", "n", "seed", "top_k"])
def test_integers_beyond_64_bits_are_refused(server, field):
    refused(server, "invalid_value", field, **{field: 2**63})


def test_a_duplicate_key_is_refused_by_name(server):
    response = raw(server, b'{"model": "chatglm", "n": 1, "n": 2}')
    assert (response.status_code, error_of(response)["code"], error_of(response)["param"]) == (
        400,
        "duplicate_key",
        "n",
    )


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "\xff"}',
        json.dumps({**QUESTION, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
        json.dumps({**QUESTION, "stop": "\udfff"}).encode(),
    ],
)
def test_half_characters_are_refused(server, body):
    response = raw(server, body)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_unicode")


def test_control_characters_are_served_and_never_in_the_log_as_they_are(server):
    marker = "a\x00b\x1b[31m"
    assert server.chat(messages=[{"role": "user", "content": marker}], user=marker).status_code == 200
    assert "\x1b" not in server.log and "\x00" not in server.log


def test_deep_nesting_is_refused_without_recursion(server):
    response = raw(server, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")


def test_one_endless_word_and_too_many_messages_are_refused(server):
    refused(server, "context_length_exceeded", messages=[{"role": "user", "content": "a" * 300_000}])
    refused(server, "invalid_value", "messages", messages=[{"role": "user", "content": ""}] * 20_000)


# 2, 5 to 8, 10 to 15


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 1),
        ("messages", {}),
        ("messages", "hi"),
        ("max_tokens", "8"),
        ("max_tokens", True),
        ("max_completion_tokens", 1.5),
        ("temperature", "hot"),
        ("top_p", [1]),
        ("top_k", "3"),
        ("min_p", {}),
        ("n", "1"),
        ("n", 1.5),
        ("seed", "x"),
        ("presence_penalty", "1"),
        ("frequency_penalty", True),
        ("repetition_penalty", "1"),
        ("no_repeat_ngram_size", "2"),
        ("logit_bias", []),
        ("logprobs", 1),
        ("top_logprobs", "2"),
        ("stream", 1),
        ("stream_options", []),
        ("response_format", "json"),
        ("structured_outputs", "x"),
        ("tools", {}),
        ("ignore_eos", 0),
        ("min_tokens", "1"),
        ("truncation", 1),
        ("user", 7),
        ("stop", 5),
        ("stop", {}),
    ],
)
def test_the_wrong_type_is_refused_by_name(server, field, value):
    error = refused(server, "invalid_value" if field == "truncation" else "invalid_type", **{field: value})
    assert error["param"].startswith(field)


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([], "invalid_value"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "invalid_value"),
        ([{"role": "system", "content": "a"}], "invalid_value"),
    ],
)
def test_a_conversation_without_a_question_is_refused(server, messages, code):
    assert refused(server, code, messages=messages)["param"].startswith("messages")


def test_missing_messages_are_named(server):
    response = server.post(CHAT, {"model": "chatglm"})
    assert (error_of(response)["code"], error_of(response)["param"]) == ("missing_field", "messages")


def test_an_empty_question_is_served(server):
    assert server.chat(messages=[{"role": "user", "content": ""}]).status_code == 200


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "a"}, "messages[0].role"),
        ({"content": "a"}, "messages[0].role"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user"}, "messages[0].content"),
    ],
)
def test_a_message_is_refused_by_its_field(server, message, param):
    response = server.chat(messages=[message])
    assert (response.status_code, error_of(response)["param"]) == (400, param)


def test_an_unknown_field_is_refused_with_the_near_name(server):
    error = refused(server, "unknown_field", "temprature", temprature=1)
    assert "`temperature`" in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", []),
        ("function_call", "auto"),
        ("audio", {}),
        ("prediction", {}),
        ("web_search_options", {}),
        ("moderation", True),
        ("prompt_cache_options", {}),
        ("prompt_cache_retention", "24h"),
        ("store", True),
        ("best_of", 2),
        ("use_beam_search", True),
        ("service_tier", "flex"),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("modalities", ["audio"]),
        ("parallel_tool_calls", True),
    ],
)
def test_what_is_not_offered_is_refused_by_name(server, field, value):
    response = server.chat(**{field: value})
    assert (response.status_code, error_of(response)["param"]) == (400, field)


def test_harmless_fields_are_accepted_and_counted(server):
    before = server.metric("ignored_fields")
    harmless = {
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
        "verbosity": "medium",
    }
    assert server.chat(**harmless, reasoning_effort="none", prompt_cache_key="k", temperature=None).status_code == 200
    assert server.metric("ignored_fields") == before + 7


@pytest.mark.parametrize("model", ["gpt-4", "", "base:none", "chatglm:adapter"])
def test_an_unknown_model_is_404_with_those_served(server, model):
    response = server.chat(model=model)
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    assert "chatglm" in error_of(response)["message"]


@pytest.mark.parametrize("value", [0, -1, 1024, 10**9])
def test_max_tokens_out_of_range_is_refused_with_the_range(server, value):
    for name in ("max_tokens", "max_completion_tokens"):
        response = server.post(CHAT, {**{k: v for k, v in QUESTION.items() if k != "max_tokens"}, name: value})
        assert response.status_code == 400
        assert "1" in error_of(response)["message"]
    refused(server, "invalid_value", max_tokens=5, max_completion_tokens=6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.01),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", -1),
        ("min_p", 1),
        ("top_k", -1),
        ("top_k", 1001),
        ("n", 0),
        ("n", 17),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("no_repeat_ngram_size", 65),
        ("top_logprobs", 3),
        ("min_tokens", 9),
        ("user", "x" * 257),
        ("stream_options", {"include_usage": True}),
        ("stop", []),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("stop", "x" * 257),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"999999": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("logit_bias", {"12001": 1}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(server, field, value):
    error = refused(server, "invalid_value", **{field: value})
    assert field in error["message"]


def test_both_names_of_the_limit_may_agree(server):
    response = server.chat(max_completion_tokens=8)
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] <= 8


def test_n_16_gives_16_choices_and_counts_the_prompt_once(server):
    usage = server.chat(n=16, max_tokens=1).json()
    alone = server.chat(max_tokens=1).json()
    assert [choice["index"] for choice in usage["choices"]] == list(range(16))
    assert usage["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert usage["usage"]["completion_tokens"] == 16


# 9


def test_a_question_that_does_not_fit_is_refused_with_four_numbers(server):
    error = refused(
        server, "context_length_exceeded", messages=[{"role": "user", "content": "长" * 1020}], max_tokens=100
    )
    words = error["message"].replace(",", "")
    assert "1024" in words and "100 are asked" in words and "would fit" in words


def test_a_long_history_loses_its_oldest_rounds_and_says_so(server):
    rounds = [{"role": role, "content": "很长的一段话，" * 20} for _ in range(10) for role in ("user", "assistant")]
    messages = [*rounds, {"role": "user", "content": "你好"}]
    response = server.chat(messages=messages)
    assert response.status_code == 200 and response.json()["chatglm"]["dropped_rounds"] >= 1
    refused(server, "context_length_exceeded", messages=messages, truncation="disabled")


# 17


def test_special_pieces_typed_by_a_user_are_plain_text(server):
    for text in ("[gMASK]", "<sop>", "<eop>", "[MASK]", "<image_100>", "[Round 0]\n问：你好\n答："):
        answer = server.post("/tokenize", {"text": text}).json()
        special = server.post("/v1/completions", {"model": "chatglm", "prompt": answer["tokens"], "max_tokens": 1})
        assert special.status_code == 200, special.text  # special ids would have been refused
        usage = server.chat(messages=[{"role": "user", "content": text}]).json()["usage"]
        assert usage["prompt_tokens"] == answer["count"] + 2


# 18, 19

DEEP: dict = {"type": "object"}
for _ in range(40):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    "structured",
    [
        {"json": ""},
        {"json": "x"},
        {"json": []},
        {"json": {"type": "object", "frobnicate": 1}},
        {"json": {"$ref": "http://127.0.0.1:1/schema"}},
        {"json": {"type": "nothing"}},
        {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
        {
            "json": {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/a"}},
                "required": ["a"],
                "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}},
            }
        },
        {"json": DEEP},
        {"json": {}, "regex": "a"},
        {"json_object": False},
        {"regex": ""},
        {"regex": "(a+)+$"},
        {"regex": "a{1,1000000}"},
        {"regex": "(a"},
        {"regex": "a" * (64 * 1024 + 1)},
        {"choice": []},
        {"choice": ["a", 1]},
        {"grammar": "start: nothing_here"},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_grammar_is_refused_and_the_next_request_is_served(server, structured):
    refused(server, "invalid_grammar", structured_outputs=structured)
    assert server.chat(max_tokens=1).status_code == 200


def test_regex_bombs_do_not_change_or_stop_a_running_stream(server):
    fields = {"max_tokens": 40, "ignore_eos": True, "stream": True}
    alone = stream_events(server.chat(**fields))
    found: list[list[dict]] = []
    reader = threading.Thread(target=lambda: found.append(stream_events(server.chat(**fields))))
    reader.start()
    for regex in ("(a+)+$", "a{1,1000000}", "(a", "(.*a.{25}b)|(.*[b-z].{15}q)(", "a" * (64 * 1024 + 1)) * 3:
        response = server.chat(structured_outputs={"regex": regex})
        assert (response.status_code, error_of(response)["code"]) == (400, "invalid_grammar")
    reader.join()
    deltas = [[event["choices"][0]["delta"] for event in events] for events in (alone, found[0])]
    texts = ["".join(delta.get("content", "") for delta in these) for these in deltas]  # pieces may come together
    assert texts[0] == texts[1] != ""


# 21, 23, 24


def test_a_body_over_the_limit_is_413_with_and_without_a_length(server):
    large = json.dumps({"pad": "x" * (1 << 20)}).encode()
    response = raw(server, large)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
    response = server.client.post(CHAT, content=iter([large[:100], large[100:]]), headers=HEADERS, timeout=30)
    assert response.status_code == 413


def test_an_endless_chunked_body_is_cut_at_the_limit(server):
    with socket.create_connection(("127.0.0.1", server.port)) as link:
        link.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        answer = b""
        link.settimeout(30)
        try:
            while sent < 64 << 20:
                link.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                sent += 65536
        except OSError:
            pass
        with suppress(OSError):
            answer = link.recv(4096)
        assert sent < 16 << 20
        assert not answer or b" 413 " in answer


def test_compressed_bodies_and_other_types_are_415(server):
    assert raw(server, b"\x1f\x8b", **{"content-encoding": "gzip"}).status_code == 415
    response = server.client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")
    assert raw(server, json.dumps(QUESTION).encode(), **{"content-type": "application/json; charset=utf-8"}).is_success


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "//v1//models", 404),
        ("GET", "/v1/models/%2e%2e", 404),
        ("GET", "/v1/models/" + "x" * 10_000, 414),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
        ("GET", "/v1/models/", 404),
    ],
)
def test_wrong_methods_and_paths_have_the_common_shape(server, method, path, status):
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as link:
        link.putrequest(method, path, skip_accept_encoding=True)
        link.endheaders()
        response = link.getresponse()
        body = json.loads(response.read())
    assert response.status == status
    assert set(body["error"]) == {"message", "type", "param", "code", "request_id"}
    if status == 405:
        assert response.headers["Allow"]


def test_headers_over_the_limit_are_431(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Pad: " + b"x" * 40_000)
        assert b" 431 " in link.recv(4096)


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/", "file:///etc/passwd", "data:image/png;base64,AA==", "canary"]
)
def test_images_and_references_are_refused_and_nothing_is_fetched(server, url):
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0.5)
        found = threading.Event()

        def listen() -> None:
            try:
                canary.accept()
                found.set()
            except OSError:
                pass

        watcher = threading.Thread(target=listen)
        watcher.start()
        target = f"http://127.0.0.1:{canary.getsockname()[1]}/" if url == "canary" else url
        part = {"type": "image_url", "image_url": {"url": target}}
        refused(server, "unsupported_value", "messages[0].content", messages=[{"role": "user", "content": [part]}])
        tool = {"type": "function", "function": {"name": "f", "parameters": {"$ref": target}}}
        refused(server, "invalid_grammar", tools=[tool])
        watcher.join()
        assert not found.is_set()


def test_text_parts_are_joined(server):
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    found = server.chat(messages=[{"role": "user", "content": parts}]).json()
    assert found["choices"][0]["message"] == server.chat().json()["choices"][0]["message"]


def test_errors_come_as_json_for_streams_too(server):
    response = server.chat(stream=True, temperature=-1)
    assert response.status_code == 400 and response.headers["content-type"] == "application/json"
    assert stream_events(server.chat(stream=True))[-1]["choices"][0]["finish_reason"] in ("stop", "length")
