"""The feedback file: whole after anything, refused where it cannot be kept (test 39, I8)."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chatglm.errors import RequestError
from chatglm.server.feedback import ids, schema
from chatglm.server.feedback.store import FeedbackStore, FeedbackUnavailable
from feedback_events import answer, event, identity, rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "feedback.db"


@pytest.fixture
def store(path: Path):
    opened = FeedbackStore(path, busy_timeout_s=0.05, give_up_s=0.3)
    yield opened
    opened.close()


def test_an_acknowledged_event_is_there_with_its_answer_and_conversation(store, path):
    saved = store.save(event(answer("a", text="你好"), thumb=1, tags=("other",), comment="fine")).result()
    assert saved.is_new
    assert rows(path, "SELECT id, thumb, rating, tags_json, comment FROM feedback") == [
        (saved.id, 1, None, '["other"]', "fine")
    ]
    assert rows(path, "SELECT text, model, sampling_json FROM answer") == [
        ("你好", "chatglm", '{"seed": 7, "temperature": 0.5}')
    ]
    assert rows(path, "SELECT language FROM conversation") == [("en",)]


def test_the_file_has_its_settings_and_is_for_its_owner_only(store, path):
    store.save(event(answer("a"))).result()
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert rows(path, "PRAGMA journal_mode") == [("wal",)]
    assert rows(path, "PRAGMA user_version") == [(len(schema.MIGRATIONS),)]
    settings = store.submit(
        lambda c: [c.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "foreign_keys")]
    )
    assert settings.result() == [2, 1]  # FULL, ON
    assert dict(rows(path, "SELECT key, value FROM meta")).keys() == {"created", "schema_version", "app_version"}


def test_a_rater_who_speaks_again_replaces_what_was_said(store, path):
    first = store.save(event(answer("a"), thumb=1)).result()
    again = store.save(event(answer("a"), rating=2, correction="better")).result()
    assert (again.id, again.is_new) == (first.id, False)
    store.save(event(answer("a"), thumb=-1, rater="bob")).result()
    assert rows(path, "SELECT rater, thumb, rating, correction FROM feedback ORDER BY rater") == [
        ("ann", None, 2, "better"),
        ("bob", -1, None, None),
    ]


def test_deleting_takes_what_nobody_speaks_of_any_more(store, path):
    store.save(event(answer("a"), answer("b"), preferred_over=identity("b"))).result()
    store.save(event(answer("b"), rater="bob")).result()
    assert store.delete(identity("a"), "stranger").result() == 0
    assert store.delete(identity("b"), "bob").result() == 1  # still spoken of, as the worse one
    assert rows(path, "SELECT count(*) FROM answer") == [(2,)]
    assert store.delete(identity("a"), "ann").result() == 1
    for table in ("feedback", "answer", "conversation"):
        assert rows(path, f"SELECT count(*) FROM {table}") == [(0,)]
    assert rows(path, "SELECT action, count FROM audit") == [("delete", 1), ("delete", 1)]


@pytest.mark.parametrize("opinion", [{"comment": "nothing else"}, {"thumb": 2}, {"rating": 6}, {"rating": 0}])
def test_the_file_itself_refuses_what_is_no_opinion(store, path, opinion):
    with pytest.raises(sqlite3.IntegrityError):
        store.save(event(answer("a"), **opinion)).result()
    assert rows(path, "SELECT count(*) FROM answer") == [(0,)]  # the whole event is absent
    assert store.save(event(answer("a"))).result().is_new


def test_a_full_disk_loses_the_event_and_nothing_else(store, path):
    store.save(event(answer("a"))).result()
    store.submit(
        lambda c: c.execute(f"PRAGMA max_page_count = {c.execute('PRAGMA page_count').fetchone()[0]}")
    ).result()
    with pytest.raises(FeedbackUnavailable, match="full"):
        store.save(event(answer("b", text="x" * 50_000))).result()
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    assert rows(path, "SELECT answer_id FROM feedback") == [(identity("a"),)]
    store.submit(lambda c: c.execute("PRAGMA max_page_count = 100000")).result()
    assert store.save(event(answer("b", text="x" * 50_000))).result().is_new  # room again: as before


def test_a_locked_file_is_tried_again_then_given_up_and_later_writes_succeed(store, path):
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(FeedbackUnavailable, match="locked"):
        store.save(event(answer("a"))).result()
    assert rows(path, "SELECT count(*) FROM feedback") == [(0,)]
    waiting = store.save(event(answer("b")))
    other.execute("ROLLBACK")
    other.close()
    assert waiting.result().is_new


def test_writers_of_one_file_in_several_processes_and_threads_lose_nothing(path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from chatglm.server.feedback.store import FeedbackStore
from feedback_events import answer, event
store = FeedbackStore({str(path)!r})
futures = [store.save(event(answer(f"{{sys.argv[1]}}{{n}}"), rater=sys.argv[1])) for n in range(40)]
assert all(future.result().is_new for future in futures)
store.close()
"""
    running = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("p", "q")]  # both make the file
    here = FeedbackStore(path)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: here.save(event(answer(f"r{n}"), rater="r")).result(), range(40)))
    assert [process.wait(60) for process in running] == [0, 0]
    here.close()
    assert rows(path, "SELECT rater, count(*) FROM feedback GROUP BY rater ORDER BY rater") == [
        ("p", 40),
        ("q", 40),
        ("r", 40),
    ]
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_killed_writer_leaves_whole_rows_and_all_that_were_acknowledged(path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from chatglm.server.feedback.store import FeedbackStore
from feedback_events import answer, event
store = FeedbackStore({str(path)!r})
for n in range(100_000):
    store.save(event(answer(f"n{{n}}", text="x" * 20_000))).result()
    print(n, flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    told = [int(writer.stdout.readline()) for _ in range(20)]
    os.kill(writer.pid, signal.SIGKILL)
    told += [int(line) for line in writer.stdout.read().split()]
    writer.stdout.close()
    writer.wait()
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    assert rows(path, "PRAGMA foreign_key_check") == []
    found = rows(path, "SELECT length(text) FROM feedback JOIN answer ON answer.id = answer_id")
    assert len(told) <= len(found) <= len(told) + 1
    assert set(found) == {(20_000,)}
    FeedbackStore(path).close()  # it opens again without repair


def test_a_damaged_file_is_refused_and_not_touched(path):
    store = FeedbackStore(path)
    for n in range(20):
        store.save(event(answer(f"n{n}", text="x" * 5_000))).result()
    store.close()
    raw = bytearray(path.read_bytes())
    raw[4096:40960] = b"\x5a" * (40960 - 4096)
    path.write_bytes(raw)
    with pytest.raises(RequestError, match=r"feedback\.db.*damaged"):
        FeedbackStore(path)
    assert path.read_bytes() == bytes(raw)


@pytest.mark.parametrize("content", [b"not a database at all " * 200, b"{}"])
def test_a_file_of_another_kind_is_refused_and_not_touched(path, content):
    path.write_bytes(content)
    with pytest.raises(RequestError, match="not a feedback file"):
        FeedbackStore(path)
    assert path.read_bytes() == content


def test_another_programs_database_and_a_later_version_are_refused(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(RequestError, match="another program's database"):
        FeedbackStore(path)
    path.unlink()
    FeedbackStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(RequestError, match=r"version 99.*up to 1"):
        FeedbackStore(path)


def test_an_interrupted_first_start_is_finished_by_the_next_one(path):
    path.touch()
    FeedbackStore(path).close()
    assert rows(path, "SELECT count(*) FROM feedback") == [(0,)]


@pytest.mark.parametrize("place", ["/proc/feedback.db", "/nowhere/feedback.db"])
def test_a_path_that_cannot_be_written_is_one_clear_line(place):
    with pytest.raises(RequestError) as caught:
        FeedbackStore(place)
    assert place in caught.value.message and "\n" not in caught.value.message


MOUNTS = """\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / /data rw,relatime shared:1 - nfs4 server:/x rw
31 22 0:41 / /data/local\\040disk rw - xfs /dev/sdb rw
"""


@pytest.mark.parametrize(
    ("place", "kind"),
    [("/data/feedback.db", "nfs4"), ("/data/local disk/f.db", "xfs"), ("/database/f.db", "ext4"), ("/data", "nfs4")],
)
def test_the_file_system_is_that_of_the_nearest_mount(place, kind):
    assert schema.file_system_of(Path(place), MOUNTS) == kind


def test_a_network_file_system_is_refused_before_anything_is_made(path, monkeypatch):
    monkeypatch.setattr(schema, "file_system_of", lambda path: "cifs")
    with pytest.raises(RequestError, match="network file system"):
        FeedbackStore(path)
    assert not path.exists()


def test_ids_are_unique_and_sort_by_time_whatever_the_clock_does():
    made = [ids.uuid7(at) for at in (1_000, 2_000, 1_000, 1_000)]  # set back by a second
    assert len(set(made)) == 4
    assert made[0] < made[1] > made[2]
    assert all(identity[14] == "7" and identity[19] in "89ab" and ids.ID.match(identity) for identity in made)


def test_a_clock_that_is_set_back_makes_no_update_older_than_its_row(store, path, monkeypatch):
    store.save(event(answer("a"), thumb=1)).result()
    before = rows(path, "SELECT updated_at FROM feedback")
    monkeypatch.setattr("chatglm.server.feedback.store.now_ms", lambda: 5)
    store.save(event(answer("a"), thumb=-1)).result()
    assert rows(path, "SELECT updated_at FROM feedback") == before
    assert rows(path, "SELECT thumb FROM feedback") == [(-1,)]


def test_a_closed_store_writes_what_waits_and_takes_no_more(path):
    store = FeedbackStore(path)
    futures = [store.save(event(answer(f"n{n}"))) for n in range(10)]
    store.close()
    assert all(future.result().is_new for future in futures)
    with pytest.raises(FeedbackUnavailable):
        store.save(event(answer("late"))).result()
