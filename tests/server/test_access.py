"""Who may come in, how often, from where (tests 34 to 36)."""

from __future__ import annotations

import httpx
import pytest

from server_process import QUESTION, error_of, until

KEY, OTHER = "correct-horse-1", "battery-staple-2"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    from server_process import ServerProcess

    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(f"# team\nann:{KEY}\nbob:{OTHER}\n")
    server = ServerProcess(
        "--api-key-file", str(file), "--rate-limit", "4/minute", "--cors-origin", "https://page.example"
    )
    yield server
    server.stop()
    server.close()


def ask(server, key: str | None = None, **headers: str) -> httpx.Response:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return server.post("/v1/chat/completions", {**QUESTION, "max_tokens": 1}, headers=headers)


@pytest.mark.parametrize("key", [None, "wrong", "x" * 10_240])
def test_without_the_right_key_nobody_comes_in(guarded, key):
    response = ask(guarded, key)
    assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_key_in_the_address_or_not_in_ascii_is_none(guarded):
    response = guarded.post(f"/v1/chat/completions?api_key={KEY}", QUESTION)
    assert response.status_code == 401
    headers = {"authorization": "Bearer schlüssel".encode("latin-1")}
    assert guarded.client.post("/v1/chat/completions", json=QUESTION, headers=headers).status_code == 401


def test_the_body_of_a_stranger_is_not_read(guarded):
    response = guarded.client.post("/v1/chat/completions", content=b"x" * (4 << 20), headers={"content-type": "text/x"})
    assert response.status_code == 401


def test_the_word_bearer_may_be_written_in_any_case(guarded):
    assert ask(guarded, authorization=f"bEaReR {OTHER}").status_code == 200


def test_probes_need_no_key_and_keys_are_in_no_log_and_metric(guarded):
    assert guarded.status("/health") == guarded.status("/ready") == 200
    assert guarded.status("/v1/models") == 401
    ask(guarded, OTHER)
    until(lambda: "key=bob" in guarded.log, "the key's name in the log")
    text = guarded.log + guarded.client.get("/metrics").text
    assert KEY not in text and OTHER not in text and "你好" not in text


def test_a_rate_holds_for_its_key_alone_whatever_headers_say(guarded):
    answers = [ask(guarded, KEY, **{"x-forwarded-for": f"10.0.0.{i}"}) for i in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 4 + [429]
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "3"
    assert error_of(answers[-1])["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert answers[-1].headers["x-ratelimit-remaining-requests"] == "0"
    assert guarded.metric("rate_limited") >= 1


def test_cors_passes_the_named_origin_only(guarded):
    ask_first = {"access-control-request-method": "POST"}
    good = guarded.client.options("/v1/models", headers={"origin": "https://page.example", **ask_first})
    assert good.status_code == 204 and good.headers["access-control-allow-origin"] == "https://page.example"
    for origin in ("https://evil.example", "null"):
        answer = guarded.client.options("/v1/models", headers={"origin": origin, **ask_first})
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_without_configuration_there_is_no_cors(server):
    headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
    answers = [server.client.options("/v1/models", headers=headers), server.chat(max_tokens=1, user="x")]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


def test_another_host_name_is_forbidden_on_loopback(server):
    response = server.client.get("/v1/models", headers={"host": "evil.example"})
    assert (response.status_code, error_of(response)["code"]) == (403, "forbidden")
    assert server.client.get("/v1/models", headers={"host": "localhost:1234"}).status_code == 200


def test_a_request_id_is_kept_when_it_is_harmless(server):
    assert server.client.get("/health", headers={"x-request-id": "a.b-1"}).headers["x-request-id"] == "a.b-1"
    made = server.client.get("/health", headers={"x-request-id": "a b<script>"}).headers["x-request-id"]
    assert len(made) == 32
    assert server.client.get("/health").headers["x-content-type-options"] == "nosniff"
