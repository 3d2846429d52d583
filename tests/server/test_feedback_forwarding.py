"""`serve --feedback-url`: feedback is kept in a folder and sent on to another server."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from chatglm.errors import RequestError
from chatglm.server.feedback import spool as spools
from chatglm.server.feedback.body import FeedbackBody
from chatglm.server.feedback.forwarding import FeedbackForwarder, body_of, rater_name
from chatglm.server.feedback.spool import Spool
from chatglm.server.feedback.store import FeedbackUnavailable
from command_line import run
from feedback_events import answer, event, identity, rows
from server_process import until


class Central:
    """A server that notes what it is sent and answers with the statuses it is told, then with 200."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str | None, Any]] = []
        self.statuses: list[int] = []
        central = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                central.seen.append(
                    (self.command, self.path, self.headers.get("Authorization"), json.loads(body) if body else None)
                )
                status = central.statuses.pop(0) if central.statuses else 200
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_POST = do_DELETE = do_GET = answer

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def central() -> Iterator[Central]:
    made = Central()
    yield made
    made.close()


@pytest.fixture
def forward(tmp_path) -> Iterator[Callable[..., FeedbackForwarder]]:
    made: list[FeedbackForwarder] = []

    def begin(url: str, key: str | None = None) -> FeedbackForwarder:
        made.append(FeedbackForwarder(url, key, tmp_path / "spool", first_wait_s=0.02))
        return made[-1]

    yield begin
    for each in made:
        each.close()


def kept(tmp_path, suffix: str = ".json") -> list[Any]:
    return sorted((tmp_path / "spool").glob(f"*{suffix}"))


def is_sent(tmp_path) -> bool:
    return not kept(tmp_path)


def test_an_opinion_is_sent_with_its_answers_and_the_key(central, forward, tmp_path):
    forwarder = forward(central.url + "/", "secret-key")
    both = [answer(name, prompt_hash="ab" * 32) for name in "ab"]
    given = event(*both, rater="ann smith", thumb=1, preferred_over=identity("b"), tags=("wrong",))
    assert forwarder.save(given).result(60).is_new
    until(lambda: central.seen and is_sent(tmp_path), "the opinion to be taken")
    ((method, path, key, body),) = central.seen
    assert (method, path, key) == ("POST", "/v1/feedback", "Bearer secret-key")
    assert body == json.loads(json.dumps(body_of(given)))
    read = FeedbackBody.model_validate(body)
    stored = read.event(rater=read.rater, key_name=None, prompt_hash=given.answers[0].prompt_hash)
    assert {one.id: one for one in stored.answers} == {one.id: one for one in both}
    assert stored.opinion.preferred_over == identity("b")
    assert read.rater == rater_name("ann smith") == "ann-smith"


def test_what_a_server_cannot_take_now_waits_and_goes_out_in_its_order(central, forward, tmp_path):
    central.statuses = [503, 429, 500, 401, 404]
    forwarder = forward(central.url)
    forwarder.save(event(answer("a"), thumb=1)).result(60)
    forwarder.save(event(answer("a"), thumb=-1)).result(60)
    assert forwarder.delete(identity("a"), "ann").result(60) == 1
    until(lambda: is_sent(tmp_path), "all to be taken")
    said = [(method, (body or {}).get("thumb")) for method, _, _, body in central.seen]
    assert said == [("POST", 1)] * 6 + [("POST", -1), ("DELETE", None)]
    assert central.seen[-1][1] == f"/v1/feedback/{identity('a')}?rater=ann"


def test_what_is_refused_for_good_is_kept_aside_and_the_next_goes_out(central, forward, tmp_path):
    central.statuses = [400, 200, 404]
    forwarder = forward(central.url)
    forwarder.save(event(answer("a"), thumb=1)).result(60)
    forwarder.save(event(answer("b"), thumb=1)).result(60)
    forwarder.delete(identity("c"), "ann").result(60)  # 404: it is not there, which was the wish
    until(lambda: is_sent(tmp_path), "all to be over")
    (refused,) = kept(tmp_path, ".refused")
    assert json.loads(refused.read_text(encoding="utf-8"))["body"]["answer"]["id"] == identity("a")
    assert len(central.seen) == 3


def test_a_redirect_is_not_followed_with_the_key(central, forward, tmp_path):
    central.statuses = [307]
    forward(central.url, "secret-key").save(event(answer("a"), thumb=1)).result(60)
    until(lambda: is_sent(tmp_path), "the second try")
    assert [path for _, path, _, _ in central.seen] == ["/v1/feedback", "/v1/feedback"]


def test_what_was_not_sent_is_sent_by_the_next_server(central, forward, tmp_path):
    gone = forward("http://127.0.0.1:9")
    gone.save(event(answer("a"), thumb=1)).result(60)
    gone.close()
    assert len(kept(tmp_path)) == 1 and not central.seen
    assert stat.S_IMODE(kept(tmp_path)[0].stat().st_mode) == 0o600
    forward(central.url)
    until(lambda: central.seen and is_sent(tmp_path), "the opinion to be taken")


WRITER = """
import sys
from chatglm.server.feedback.forwarding import FeedbackForwarder
from command_line import run
from feedback_events import answer, event
forwarder = FeedbackForwarder("http://127.0.0.1:9", None, sys.argv[1])
for number in range(100_000):
    forwarder.save(event(answer(f"n{number}"), thumb=1)).result()
    print(number, flush=True)
"""


def test_a_kill_loses_nothing_that_was_acknowledged(central, forward, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(tmp_path / "spool")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert writer.stdout is not None
    told = [int(next(writer.stdout)) for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    told += [int(line) for line in writer.stdout.read().split() if line]
    writer.wait()
    writer.stdout.close()
    forward(central.url)
    until(lambda: is_sent(tmp_path), "all to be taken")
    taken = {body["answer"]["id"] for _, _, _, body in central.seen}
    assert {identity(f"n{number}") for number in told} <= taken
    assert not kept(tmp_path, ".refused")


def test_of_two_processes_with_one_folder_one_sends(tmp_path):
    first, second = Spool(tmp_path), Spool(tmp_path)
    with first.sending() as one, second.sending() as other:
        assert one and not other
    with second.sending() as other:
        assert other
    first.close()
    second.close()


def test_a_clock_that_is_set_back_changes_no_order(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    times = iter([5_000, 3_000, 4_000])
    monkeypatch.setattr("time.time_ns", lambda: next(times))
    for number in range(3):
        spool.put({"number": number})
    read = [json.loads(path.read_text(encoding="utf-8"))["number"] for path in spool.waiting()]
    assert read == [0, 1, 2]
    spool.close()


def test_a_full_folder_is_told_and_nothing_is_left_half_written(forward, tmp_path, monkeypatch):
    forwarder = forward("http://127.0.0.1:9")
    monkeypatch.setattr(spools, "MOST", 1)
    forwarder.save(event(answer("a"), thumb=1)).result(60)
    with pytest.raises(FeedbackUnavailable, match="wait to be sent"):
        forwarder.save(event(answer("b"), thumb=1)).result(60)
    assert len(kept(tmp_path, "")) == 2  # the opinion and the lock


def test_a_server_hands_on_what_it_is_given_and_what_came_while_the_other_one_was_away(start, tmp_path):
    db, key = tmp_path / "central.db", "correct-horse-1"
    central = start("--feedback-db", str(db), "--api-key", f"branch:{key}")
    url, spool = f"http://127.0.0.1:{central.port}", str(tmp_path / "spool")
    central.stop()
    branch = start("--feedback-url", url, "--feedback-spool", spool, "--feedback-key", key)
    given = {
        "answer": {"id": identity("a"), "text": "t", "messages": [{"role": "user", "content": "q"}]},
        "rater": "r-1",
    }
    assert branch.post("/v1/feedback", {**given, "thumb": 1}).status_code == 200
    branch.process.kill()
    branch.process.wait()
    assert len(kept(tmp_path)) == 1
    start("--port", str(central.port), "--feedback-db", str(db), "--api-key", f"branch:{key}")
    branch = start("--feedback-url", url, "--feedback-spool", spool, "--feedback-key", key)
    assert branch.post("/v1/feedback", {**given, "rating": 2}).status_code == 200
    until(lambda: is_sent(tmp_path), "both to be sent")
    assert rows(db, "SELECT rater, thumb, rating, text FROM feedback JOIN answer ON answer.id = answer_id") == [
        ("r-1", None, 2, "t")
    ]
    assert branch.client.delete(f"/v1/feedback/{identity('a')}?rater=r-1").status_code == 200
    until(lambda: rows(db, "SELECT * FROM feedback") == [], "the opinion to be gone")
    assert key not in branch.log


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--feedback-url", "http://x"), "--feedback-spool"),
        (("--feedback-url", "x.org", "--feedback-spool", "s"), "must be the address"),
        (("--feedback-url", "http://u:p@x", "--feedback-spool", "s"), "must be the address"),
        (("--feedback-url", "http://x", "--feedback-spool", "s", "--feedback-db", "d"), "give one of them"),
        (("--feedback-spool", "s"), "go with --feedback-url"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_at_start(options, said):
    done = run("serve", *options)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.replace("\u2502", " ").split())


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RequestError, match="feedback cannot be kept there"):
        Spool(tmp_path / "file" / "spool")
