"""`/v1/feedback` on a real server: who may, what is refused, a locked or full file, a kill (tests 30 and 39)."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
from typing import Any

import httpx
import pytest

from feedback_events import identity, rows
from server_process import ServerProcess, error_of, until

KEYS = {"ann": "correct-horse-1", "admin-eve": "battery-staple-2"}


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    return tmp_path_factory.mktemp("feedback") / "feedback.db"


@pytest.fixture(scope="module")
def server(db, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    started = ServerProcess("--feedback-db", str(db), "--api-key-file", str(file))
    yield started
    assert started.stop() == 0
    assert rows(db, "PRAGMA integrity_check") == [("ok",)]
    started.close()


def body(name: str, **more: Any) -> dict[str, Any]:
    given = {"id": identity(name), "messages": [{"role": "user", "content": "你好"}], "text": f"text of {name}"}
    more = more or {"thumb": 1}
    return {"conversation": {"id": identity("talk")}, "answer": given, **more}


def give(server: ServerProcess, content: Any, key: str = "ann") -> httpx.Response:
    return server.post("/v1/feedback", content, headers={"authorization": f"Bearer {KEYS[key]}"})


def ask(server: ServerProcess, method: str, path: str, key: str = "ann") -> httpx.Response:
    return server.client.request(method, path, headers={"authorization": f"Bearer {KEYS[key]}"})


def test_an_opinion_is_stored_replaced_and_deleted(server, db):
    first = give(server, body("a", thumb=-1, correction="better", tags=["wrong"], comment="no"))
    assert first.status_code == 200, first.text
    assert first.json()["replaced"] is False and first.json()["rater"] == "ann"
    again = give(server, body("a", rating=4))
    assert (again.json()["id"], again.json()["replaced"]) == (first.json()["id"], True)
    where = f"WHERE answer_id = '{identity('a')}'"
    assert rows(db, f"SELECT thumb, rating, correction FROM feedback {where}") == [(None, 4, None)]
    assert rows(db, f"SELECT key_name FROM conversation WHERE id = '{identity('talk')}'") == [("ann",)]
    assert ask(server, "DELETE", f"/v1/feedback/{identity('a')}?rater=other").status_code == 404
    assert ask(server, "DELETE", f"/v1/feedback/{identity('a')}").json()["deleted"] is True
    assert rows(db, f"SELECT * FROM feedback {where}") == []
    assert error_of(ask(server, "DELETE", f"/v1/feedback/{identity('a')}"))["code"] == "not_found"


def test_answers_to_the_same_messages_can_be_compared(server, db):
    other = {"id": identity("worse"), "messages": [{"role": "user", "content": "你好"}], "text": "worse"}
    assert give(server, body("better", preferred_over=other)).status_code == 200
    found = rows(db, "SELECT DISTINCT prompt_ids_sha256 FROM answer")
    assert len(found) == 1 and len(found[0][0]) == 64


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"thumb": 2}, "invalid_value", "thumb"),
        ({"thumb": None, "comment": "only this"}, "missing_field", None),
        ({"rating": 6}, "invalid_value", "rating"),
        ({"thumb": 1, "tags": ["rude"]}, "invalid_value", "tags"),
        ({"thumb": 1, "answer": {"text": "x"}}, "missing_field", "answer.messages"),
        ({"thumb": 1, "answer": {"text": "x", "messages": []}}, "invalid_value", "answer.messages"),
        ({"thumb": 1, "rater": "no blanks"}, "invalid_value", "rater"),
        ({"thumb": 1, "stars": 3}, "unknown_field", "stars"),
        ({"correction": "x" * 65_537}, "invalid_value", "correction"),
        ({"correction": "字" * 21_846}, "invalid_value", "correction"),
        ({"thumb": 1, "conversation": {"id": "1"}}, "invalid_value", "conversation.id"),
    ],
)
def test_what_is_no_opinion_is_refused_by_name(server, db, change, code, param):
    before = rows(db, "SELECT count(*) FROM feedback")
    response = give(server, body("bad", **change))
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, code), error
    assert (error["param"] or "").startswith(param or "")
    assert rows(db, "SELECT count(*) FROM feedback") == before


def test_a_text_of_64_kib_is_taken(server):
    assert give(server, body("long", correction="x" * 65_536)).status_code == 200


def test_the_export_is_for_an_admin_key(server, db):
    give(server, body("x", correction="better"))
    assert server.status("/v1/feedback/export") == 401
    assert error_of(ask(server, "GET", "/v1/feedback/export"))["code"] == "forbidden"
    found = ask(server, "GET", "/v1/feedback/export?format=pairs&redact=true", "admin-eve")
    assert found.status_code == 200
    lines = [json.loads(line) for line in found.text.splitlines()]
    assert [line["raters"] for line in lines if line["chosen"] == "better"] == [["rater-1"]]
    assert found.headers["x-count"] == str(len(lines))
    assert rows(db, "SELECT count FROM audit WHERE action = 'export'") == [(len(lines),)]
    for query in ("format=xml", "since=soon", "min_rating=9", "redact=maybe", "limit=3"):
        assert ask(server, "GET", f"/v1/feedback/export?{query}", "admin-eve").status_code == 400


def test_opinions_are_counted_and_never_logged(server):
    before = server.metric("feedback", metrics(server))
    give(server, body("counted", thumb=1, rating=5, comment="a secret remark"))
    assert server.metric("feedback", metrics(server)) == before + 2
    until(lambda: "feedback=thumb_up,rating" in server.log, "the log line")
    assert "a secret remark" not in server.log and "text of counted" not in server.log


def metrics(server: ServerProcess) -> str:
    return server.client.get("/metrics").text


def test_a_file_locked_for_long_is_503_and_chat_goes_on_meanwhile(server, db):
    other = sqlite3.connect(db, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(give(server, body("locked"))))
    waiting.start()
    headers = {"authorization": f"Bearer {KEYS['ann']}"}
    question = {"model": "chatglm", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 1}
    assert server.post("/v1/chat/completions", question, headers=headers).status_code == 200
    assert not answers  # still being tried
    waiting.join()
    other.execute("ROLLBACK")
    other.close()
    assert (answers[0].status_code, error_of(answers[0])["code"]) == (503, "feedback_unavailable")
    assert "retry-after" in answers[0].headers
    assert server.metric("feedback_write_errors", metrics(server)) == 1
    assert rows(db, f"SELECT * FROM feedback WHERE answer_id = '{identity('locked')}'") == []
    assert give(server, body("locked")).status_code == 200


def test_without_a_file_feedback_is_not_offered(shared_server):
    assert error_of(shared_server.post("/v1/feedback", {**body("a"), "rater": "r"}))["code"] == "not_found"


def test_a_full_disk_is_503_and_a_kill_leaves_what_was_acknowledged(start, tmp_path):
    path = tmp_path / "feedback.db"
    server = start("--feedback-db", str(path), faults={"feedback_pages": 30})
    assert error_of(server.post("/v1/feedback", body("nobody")))["param"] == "rater"
    told = []
    for number in range(20):
        response = server.post("/v1/feedback", body(f"n{number}", correction="x" * 20_000) | {"rater": "r"})
        if response.status_code != 200:
            break
        told.append(identity(f"n{number}"))
    assert (response.status_code, error_of(response)["code"]) == (503, "feedback_unavailable")
    assert "full" in error_of(response)["message"]
    assert server.chat(max_tokens=1).status_code == 200
    assert server.status("/ready") == 200
    threads = [
        threading.Thread(target=lambda n=n: server_post_quietly(server, body(f"m{n}") | {"rater": "r"}, told, f"m{n}"))
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    server.process.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join()
    server.process.wait()
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    assert rows(path, "PRAGMA foreign_key_check") == []
    found = {row[0] for row in rows(path, "SELECT answer_id FROM feedback JOIN answer ON answer.id = answer_id")}
    assert set(told) <= found
    assert len(rows(path, "SELECT id FROM feedback")) == len(found)


def server_post_quietly(server: ServerProcess, content: Any, told: list[str], name: str) -> None:
    try:
        if httpx.post(server.url + "/v1/feedback", json=content, timeout=30).status_code == 200:
            told.append(identity(name))
    except httpx.HTTPError:
        pass  # killed under it: not acknowledged


@pytest.mark.parametrize("place", ["/proc/feedback.db", "/nowhere/feedback.db"])
def test_a_file_that_cannot_be_kept_is_told_before_anything_starts(place):
    from command_line import run

    done = run("serve", "--port", "0", "--feedback-db", place)
    assert done.returncode == 1
    assert place in done.stderr and "listening" not in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_file_is_refused_at_start_and_never_overwritten(tmp_path):
    from command_line import run

    path = tmp_path / "feedback.db"
    path.write_bytes(b"these are not pages" * 999)
    before = path.read_bytes()
    done = run("serve", "--port", "0", "--feedback-db", path)
    assert done.returncode == 1 and "not a feedback file" in done.stderr
    assert path.read_bytes() == before
