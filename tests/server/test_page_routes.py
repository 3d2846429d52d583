"""The page on a real server without a browser: what is open and what is not (test 25), and that it answers."""

from __future__ import annotations

import json
import re

import httpx
import pytest

pytest.importorskip("gradio", reason="the extra `web` is not installed")

from feedback_events import rows
from page_client import PageClient
from server_process import ServerProcess, error_of, until

KEY = "correct-horse-1"


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    return tmp_path_factory.mktemp("feedback") / "feedback.db"


@pytest.fixture(scope="module")
def web(db):
    server = ServerProcess("--web", "--feedback-db", str(db))
    yield server
    server.audit()
    with server.client.stream("GET", "/chat/gradio_api/heartbeat/abc123") as stream:
        assert next(stream.iter_lines()) == "data: ALIVE"
        assert server.stop() == 0  # an open page does not hold the server up
    server.close()


@pytest.fixture
def page(web):
    opened = PageClient(web)
    yield opened
    opened.close()


CLOSED = [
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=https://example.org/",
    "/gradio_api/file/etc/passwd",
    "/file=/etc/passwd",
    "/gradio_api/proxy=https://example.org/",
    "/gradio_api/upload",
    "/gradio_api/upload_progress",
    "/gradio_api/component_server",
    "/gradio_api/vibe-code",
    "/gradio_api/vibe-code/",
    "/monitoring",
    "/monitoring/summary",
    "/gradio_api/runs",
    "/gradio_api/run-history/records",
    "/gradio_api/profiling/summary",
    "/gradio_api/custom_component/1/client/component/x.js",
    "/gradio_api/stream/abc/0/1/playlist.m3u8",
    "/gradio_api/process_recording",
    "/gradio_api/deep_link",
    "/gradio_api/token",
    "/gradio_api/user",
    "/gradio_api/call/ask",
    "/gradio_api/run/predict",
    "/gradio_api/openapi.json",
    "/gradio_api/dev/reload",
    "/login",
    "/logout",
    "/robots.txt",
    "/pwa_icon",
    "/static/../../../../etc/passwd",
    "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/assets/..%2f..%2f..%2fetc%2fpasswd",
    "/static//etc/passwd",
    "/%2e%2e/v1/models",
    "/gradio_api/heartbeat/../file=/etc/passwd",
    "/gradio_api/heartbeat/a/b",
    "/config/..;/gradio_api/file=/etc/passwd",
    "/static/img/logo.svg\\..\\x",
]


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_every_other_route_of_gradio_is_404_and_redirects_nowhere(web, path, method):
    raw = httpx.URL(web.url).copy_with(raw_path=b"/chat" + path.encode("utf-8"))
    response = web.client.request(method, raw, json={} if method == "POST" else None, follow_redirects=False)
    assert response.status_code == 404, response.text
    assert error_of(response)["code"] == "not_found"
    assert "location" not in response.headers and "root:" not in response.text


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"])
def test_other_methods_are_404(web, method):
    for path in ("/chat/", "/chat/config", "/chat/gradio_api/queue/join"):
        assert web.client.request(method, path).status_code == 404


def test_an_upload_writes_no_file_and_gets_no_further_than_the_border(web):
    response = web.client.post("/chat/gradio_api/upload", files={"files": ("x.txt", b"hello")})
    assert response.status_code in (404, 415)


def test_a_file_in_an_events_data_is_refused(page):
    event = page.event("send", "click")
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for data in ([file], [[{"role": "user", "content": [file]}]], [{"_type": "gradio.FileData"}]):
        body = {"data": data, "fn_index": event["id"], "session_hash": "x1"}
        response = page.client.post("/gradio_api/queue/join", json=body)
        assert error_of(response)["code"] == "unsupported_value"


def test_the_page_names_no_other_host_and_has_a_strict_policy(web):
    first = web.client.get("/chat", follow_redirects=False)
    assert (first.status_code, first.headers["location"]) == (307, "/chat/")
    response = web.client.get("/chat/")
    page = response.text
    for script in re.findall(r"<script[^>]*>", page):
        assert "http" not in script
    assert set(re.findall(r"https?://[^/\"'\s<)]+", page)) <= {web.url, "http://www.w3.org"}
    policy = response.headers["content-security-policy"]
    for rule in ("default-src 'self'", "connect-src 'self'", "frame-ancestors 'none'", "object-src 'none'"):
        assert rule in policy
    scripts = next(part for part in policy.split("; ") if part.startswith("script-src"))
    assert "'unsafe-inline'" not in scripts and "http" not in scripts and "sha256-" in scripts
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_configuration_has_no_analytics_no_share_and_no_api(page):
    assert page.config["analytics_enabled"] is False
    assert not page.config.get("is_space")
    assert page.config.get("footer_links") == []
    assert all(d["api_visibility"] == "private" for d in page.config["dependencies"])
    assert all(d["queue"] is not False or not d["backend_fn"] for d in page.config["dependencies"])


def test_the_sliders_have_the_ranges_and_defaults_of_the_api(page, web):
    schema = web.client.get("/openapi.json").json()["components"]["schemas"]["ChatBody"]["properties"]
    for name, field in (("temperature", "temperature"), ("top-p", "top_p"), ("top-k", "top_k")):
        props, limits = page.props[name], schema[field]
        assert props["value"] == limits["default"]
        assert props["maximum"] == limits["maximum"]
        assert limits.get("minimum", limits.get("exclusiveMinimum")) <= props["minimum"]
    context = web.client.get("/v1/models").json()["data"][0]["max_model_len"]
    assert page.props["max-tokens"]["maximum"] == context - 1


def test_another_sites_page_is_refused_and_told_nothing(web):
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}):
        response = web.client.get("/chat/config", headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (403, "forbidden")
        assert not [name for name in response.headers if name.startswith("access-control")]
    same = web.client.get("/chat/config", headers={"origin": web.url})
    assert same.status_code == 200
    assert not [name for name in same.headers if name.startswith("access-control")]


def test_a_question_is_answered_as_the_api_answers_it(page, web):
    page.values |= {"temperature": 0, "max-tokens": 12}
    answered = page.ask("你好")
    assert answered == web.chat(max_tokens=12).json()["choices"][0]["message"]["content"]
    variant = page.talk["rounds"][0]["variants"][0]
    assert variant["completion_tokens"] <= 12 and variant["prompt_tokens"] > 2
    assert variant["sampling"]["temperature"] == 0 and variant["model"] == "chatglm"
    assert f"{variant['prompt_tokens'] + variant['completion_tokens']} of" in page.values["status"]
    second = page.ask("What can you do?")
    history = [("user", "你好"), ("assistant", answered), ("user", "What can you do?")]
    asked = [{"role": role, "content": text} for role, text in history]
    assert second == web.chat(max_tokens=12, messages=asked).json()["choices"][0]["message"]["content"]


def test_an_answer_comes_piece_by_piece(page):
    page.values |= {"temperature": 0, "max-tokens": 64, "question": "请介绍一下你自己"}
    messages = page.press("send")
    assert sum(message["msg"] == "process_generating" for message in messages) > 4


def test_regenerating_keeps_variants_and_undo_gives_the_question_back(page):
    page.values |= {"max-tokens": 8}
    page.ask("hello")
    page.press("regenerate")
    page.press("regenerate")
    assert len(page.talk["rounds"][0]["variants"]) == 3 and page.talk["rounds"][0]["chosen"] == 2
    assert page.values["place"] == "3 / 3"
    page.press("previous")
    assert page.talk["rounds"][0]["chosen"] == 1
    page.press("undo")
    assert page.talk["rounds"] == [] and page.values["taken"] == "hello"


def test_editing_a_question_forks_the_conversation(page):
    page.values |= {"max-tokens": 4}
    page.ask("one")
    page.ask("two")
    before = page.talk
    page.press("chat", "edit", {"index": 2, "previous_value": "two", "value": "three"})
    assert page.talk["id"] != before["id"] and page.talk["title"] == "one (2)"
    assert [round["question"] for round in page.talk["rounds"]] == ["one", "three"]
    assert page.talk["rounds"][0]["variants"][0]["text"] == before["rounds"][0]["variants"][0]["text"]
    assert page.talk["rounds"][0]["variants"][0]["id"] != before["rounds"][0]["variants"][0]["id"]


def test_a_long_history_is_shortened_and_that_is_shown(page):
    page.values |= {"temperature": 0, "max-tokens": 2}
    rounds = [{"question": "words " * 150, "variants": [{"text": "words " * 150}]}] * 6
    page.values["talk"] = json.dumps({"rounds": rounds})
    page.ask("hello")
    assert page.talk["rounds"][-1]["variants"][0]["dropped_rounds"] >= 1
    assert "left out" in page.values["status"]


def test_a_question_that_cannot_be_answered_is_told_in_the_readers_language(page):
    page.values |= {"max-tokens": 1000, "language": "zh"}
    page.ask("很长的问题" * 500)
    (variant,) = page.talk["rounds"][0]["variants"]
    assert (variant["text"], variant["error"]) == ("", "context_length_exceeded")
    assert "无法回答" in page.values["chat"][1]["content"][0]["text"]
    page.values |= {"max-tokens": 4}
    assert page.ask("你好")  # the failed round is no part of the next prompt


def test_a_page_that_is_closed_is_not_computed_for(web):
    leaver = PageClient(web, session="leaver")
    leaver.values |= {"max-tokens": 900, "temperature": 2, "top-p": 1}
    leaver.begin("写一个很长很长的故事")
    for message in leaver.follow():
        if message["msg"] == "process_generating":
            break  # leaving the loop closes the stream
    leaver.close()
    until(web.is_idle, "the answer to be cancelled")


def test_stop_keeps_what_was_said(web):
    page, presser = PageClient(web, session="stopper"), PageClient(web, session="stopper")
    page.values |= {"max-tokens": 900, "temperature": 2, "top-p": 1}
    page.begin("写一个很长很长的故事")
    seen = 0
    for message in page.follow():
        seen += message["msg"] == "process_generating"
        if seen == 3:
            presser.start("stop")
        if message["msg"] == "process_completed" and message["output"].get("data"):
            last = message["output"]["data"]
            break
    (variant,) = [v for v in last if isinstance(v, str) and '"rounds"' in v][:1]
    assert '"finish":"cancelled"' in variant or '"finish":"stop"' in variant
    until(web.is_idle, "the answer to be cancelled")
    page.close()
    presser.close()


def test_a_rating_is_stored_with_consent_only_changed_and_deleted(page, db):
    page.values |= {"max-tokens": 6, "thumb": 1}
    page.ask("rate me")
    page.values |= {"thumb": -1, "rating": 2, "correction": "better", "tags": ["wrong"], "comment": "hm"}
    page.press("save-feedback")
    assert "consent" in page.values["feedback-status"] and rows(db, "SELECT * FROM feedback") == []
    page.values["consent"] = True
    page.values |= {"thumb": -1, "rating": 2}
    page.press("save-feedback")
    assert page.values["feedback-status"] == "Saved. Thank you."
    query = "SELECT thumb, rating, correction, tags_json, comment, rater FROM feedback"
    assert rows(db, query) == [(-1, 2, "better", '["wrong"]', "hm", "browser-0123")]
    assert page.talk["rounds"][0]["variants"][0]["opinion"]["rating"] == 2
    page.press("chat", "like", {"index": 1, "value": "x", "liked": True})
    assert rows(db, query) == [(1, 2, "better", '["wrong"]', "hm", "browser-0123")]
    page.press("delete-feedback")
    assert rows(db, query) == [] and rows(db, "SELECT * FROM answer") == []
    assert page.talk["rounds"][0]["variants"][0]["opinion"] is None


def test_a_preferred_variant_becomes_a_pair(page, db, tmp_path):
    from chatglm.server.feedback.export import Filters, export
    from chatglm.server.feedback.reading import read_rows

    page.values |= {"max-tokens": 12, "consent": True, "temperature": 2, "top-p": 1}
    page.ask("compare")
    page.press("regenerate")
    page.press("prefer")
    pairs = export(read_rows([db]), "pairs", Filters())
    first, second = page.talk["rounds"][0]["variants"]
    assert first["text"] != second["text"]
    assert [(second["text"], first["text"])] == [
        (line["chosen"], line["rejected"]) for line in map(json.loads, pairs.text.splitlines())
    ]


def test_a_conversation_that_no_page_wrote_is_refused_in_words(page):
    page.values["talk"] = '{"rounds": [{"question": 7}]}'
    page.values["question"] = "hello"
    page.start("send")
    (done,) = [message for message in page.follow() if message["msg"] == "process_completed"]
    assert not done["success"] and "cannot be read" in done["output"]["error"]


def test_with_keys_the_page_asks_for_one_and_keeps_it_in_a_cookie(start):
    server = start("--web", "--api-key", f"ann:{KEY}", "--web-path", "/talk")
    asked = server.client.get("/talk/", headers={"accept-language": "zh-CN,zh"})
    assert asked.status_code == 401 and "密钥" in asked.text and "gradio" not in asked.text
    for path in ("/talk/config", "/talk/gradio_api/queue/data?session_hash=x", "/talk/theme.css"):
        assert error_of(server.client.get(path))["code"] == "invalid_api_key"
    assert error_of(server.post("/talk/key", {"key": "wrong"}))["code"] == "invalid_api_key"
    let_in = server.post("/talk/key", {"key": KEY})
    assert let_in.status_code == 204
    cookie = let_in.headers["set-cookie"]
    for part in ("HttpOnly", "SameSite=Strict", "Path=/talk"):
        assert part in cookie
    assert KEY not in cookie
    value = cookie.split(";")[0]
    page = PageClient(server, "/talk", cookie=value)
    page.values |= {"max-tokens": 2, "temperature": 0}
    assert page.ask("hello")
    page.close()
    until(lambda: "key=ann" in server.log, "the key's name in the log")
    assert "page_answer" in server.log and "prompt=" not in server.log
    assert KEY not in server.log
    assert server.client.get("/v1/models", headers={"cookie": value}).status_code == 401  # the page's only
    number, until_when, mark = value.split("=", 1)[1].split(".")
    for forged in (f"{number}.{int(until_when) + 9}.{mark}", f"1.{until_when}.{mark}", f"{number}.1.{mark}", "x", ""):
        assert server.client.get("/talk/config", headers={"cookie": f"chatglm_page={forged}"}).status_code == 401
    assert server.client.get("/chat/").status_code in (401, 404)


@pytest.mark.parametrize("path", ["chat", "/", "/v1", "/a/b", "/ä", "/health"])
def test_a_path_that_the_page_cannot_have_is_refused_at_start(path):
    from command_line import run

    done = run("serve", "--web", "--web-path", path)
    assert done.returncode == 2 and "--web-path" in done.stderr
