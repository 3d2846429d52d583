"""Feedback as training data: pairs, examples, rows; and `chatglm data feedback`."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from chatglm.server.feedback.export import Filters, export, parse_time
from chatglm.server.feedback.reading import read_rows
from chatglm.server.feedback.redaction import redacted
from chatglm.server.feedback.store import FeedbackStore
from chatglm.training.rlhf.preferences import read_preferences
from command_line import run
from feedback_events import answer, event, identity


def filled(path: Path, *events) -> Path:
    store = FeedbackStore(path)
    for each in events:
        store.save(each).result()
    store.close()
    return path


def exported(path: Path, form: str = "pairs", **filters: Any):
    return export(read_rows([path]), form, Filters(**filters))


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def pairs_of(path: Path, **filters: Any) -> list[tuple[str, str, str]]:
    return [(x["chosen"], x["rejected"], x["source"]) for x in lines_of(exported(path, **filters).text)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "feedback.db"


def test_a_correction_beats_its_answer(path):
    talk = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    filled(path, event(answer("a", messages=talk, text="bad"), correction="good"))
    (line,) = lines_of(exported(path).text)
    assert (line["prompt"], line["history"], line["system"]) == ("q2", [["q1", "a1"]], "be kind")
    assert (line["chosen"], line["rejected"], line["source"]) == ("good", "bad", "correction")
    assert (line["messages"], line["answer_ids"], line["raters"]) == (talk, [identity("a")], ["ann"])


def test_a_liked_variant_beats_a_disliked_one_of_the_same_context_only(path):
    filled(
        path,
        event(answer("a"), thumb=1),
        event(answer("b"), thumb=-1, rater="bob"),
        event(answer("c", question="another"), thumb=-1),
    )
    assert pairs_of(path) == [("text of a", "text of b", "variants")]


@pytest.mark.parametrize(("better", "worse", "count"), [(5, 3, 1), (5, 4, 0), (3, 3, 0)])
def test_ratings_speak_from_a_gap_of_two_on(path, better, worse, count):
    filled(path, event(answer("a"), rating=better), event(answer("b"), rating=worse))
    assert len(pairs_of(path)) == count


def test_an_explicit_preference_is_named_before_thumbs(path):
    filled(path, event(answer("a"), answer("b"), thumb=1, preferred_over=identity("b")), event(answer("b"), thumb=-1))
    assert pairs_of(path) == [("text of a", "text of b", "preferred")]


def test_raters_who_contradict_each_other_are_left_out_and_reported(path):
    filled(
        path,
        event(answer("a"), answer("b"), preferred_over=identity("b")),
        event(answer("b"), answer("a"), preferred_over=identity("a"), rater="bob"),
    )
    found = exported(path)
    assert found.text == ""
    (conflict,) = found.conflicts
    assert (conflict.answer_ids, conflict.raters) == ((identity("a"), identity("b")), ("ann", "bob"))


def test_an_answer_with_thumbs_up_and_down_speaks_neither_way(path):
    filled(
        path,
        event(answer("a"), thumb=1),
        event(answer("a"), thumb=-1, rater="bob"),
        event(answer("b"), thumb=-1),
    )
    for form in ("pairs", "sft"):
        found = exported(path, form)
        assert found.text == ""
        assert [(c.answer_ids, c.raters) for c in found.conflicts] == [((identity("a"),), ("ann", "bob"))]


def test_identical_and_empty_answers_make_no_pair(path):
    filled(
        path,
        event(answer("a", text="same"), thumb=1),
        event(answer("b", text="same"), thumb=-1),
        event(answer("c", text=""), thumb=-1),
        event(answer("d", text="right already"), correction="right already"),
    )
    assert pairs_of(path) == []


def test_the_same_pair_from_two_raters_is_one_line_with_both(path):
    filled(
        path,
        event(answer("a", text="bad"), correction="good"),
        event(answer("a", text="bad"), correction="good", rater="bob"),
    )
    (line,) = lines_of(exported(path).text)
    assert line["raters"] == ["ann", "bob"]


def test_pairs_are_read_by_the_training_without_a_complaint(path, tmp_path):
    filled(
        path,
        event(answer("a", text="bad"), correction="good"),
        event(answer("b", question="p"), answer("c", question="p"), preferred_over=identity("c")),
        event(answer("c", question="p"), answer("b", question="p"), preferred_over=identity("b"), rater="bob"),
    )
    file = tmp_path / "pairs.jsonl"
    file.write_text(exported(path).text, encoding="utf-8")
    assert [(p.chosen, p.rejected, p.source) for p in read_preferences(file)] == [("good", "bad", "correction")]


def test_examples_are_corrections_and_liked_answers(path):
    filled(
        path,
        event(answer("a", text="bad"), correction="good"),
        event(answer("b", text="fine"), thumb=1),
        event(answer("c"), thumb=-1),
        event(answer("d"), rating=5),
    )
    found = lines_of(exported(path, "sft").text)
    assert [(x["messages"][-1], x["source"]) for x in found] == [
        ({"role": "assistant", "content": "good"}, "correction"),
        ({"role": "assistant", "content": "fine"}, "liked"),
    ]


def test_a_least_rating_takes_answers_rated_so_high_and_no_others(path):
    filled(
        path,
        event(answer("a"), rating=5),
        event(answer("b"), rating=3),
        event(answer("c"), thumb=1, rating=3),
        event(answer("d"), thumb=1),
    )
    found = lines_of(exported(path, "sft", min_rating=4).text)
    assert [x["answer_ids"] for x in found] == [[identity("a")], [identity("d")]]
    assert len(lines_of(exported(path, "jsonl", min_rating=4).text)) == 1


def test_rows_hold_everything_and_csv_cells_run_no_formula(path):
    filled(path, event(answer("a", text="=HYPERLINK(1)"), thumb=-1, tags=("wrong",), comment="+1"))
    (row,) = lines_of(exported(path, "jsonl").text)
    assert (row["thumb"], row["tags"], row["answer"], row["sampling"]) == (
        -1,
        ["wrong"],
        "=HYPERLINK(1)",
        {"seed": 7, "temperature": 0.5},
    )
    (cells,) = csv.DictReader(io.StringIO(exported(path, "csv").text))
    assert (cells["answer"], cells["comment"], json.loads(cells["tags"])) == ("'=HYPERLINK(1)", "'+1", ["wrong"])
    assert set(cells) == set(row)


def test_filters_by_time_and_model(path):
    filled(path, event(answer("a")), event(answer("b", model="other")))
    assert len(lines_of(exported(path, "jsonl", model="other").text)) == 1
    assert exported(path, "jsonl", since=parse_time("2200-01-01")).count == 0
    assert exported(path, "jsonl", since=parse_time("2020-01-01")).count == 2


def test_redaction_hides_people_and_keeps_what_joins_rows(path):
    question = "Write to ann.lee@example.org or call 13812345678, see https://example.org/x 身份证11010519491231002X"
    filled(
        path,
        event(answer("a", question=question, text="1 + 1 = 2 at 10.0.0.1"), rater="ann", thumb=1, comment="by ann"),
    )
    (row,) = lines_of(exported(path, "jsonl", redact=True).text)
    assert row["messages"][0]["content"] == "Write to [EMAIL] or call [PHONE], see [URL] 身份证[ID]"
    assert (row["answer"], row["rater"], row["answer_id"]) == ("1 + 1 = 2 at [IP]", "rater-1", identity("a"))


def test_redaction_takes_time_in_proportion_to_the_text():
    lines = [{"answer": letter * 500_000} for letter in ("x", "1", "a@", "1.", "http://")]
    assert len(redacted(lines)) == 5  # a pattern that backtracks would be here for hours


def test_files_are_merged_in_one_order_and_the_last_word_counts(tmp_path):
    one = filled(tmp_path / "one.db", event(answer("a")), event(answer("b"), rater="bob"))
    two = filled(tmp_path / "two.db", event(answer("c")))
    copy = tmp_path / "copy.db"
    source, target = sqlite3.connect(one), sqlite3.connect(copy)
    source.backup(target)
    source.close()
    target.execute("UPDATE feedback SET comment = 'later', updated_at = updated_at + 1 WHERE rater = 'bob'")
    target.commit()
    target.close()
    merged = [export(read_rows(paths), "jsonl", Filters()).text for paths in ([one, two, copy], [copy, two, one])]
    assert merged[0] == merged[1]
    assert sorted((row["rater"], row["comment"]) for row in lines_of(merged[0])) == [
        ("ann", None),
        ("ann", None),
        ("bob", "later"),
    ]


def test_a_file_is_read_while_its_server_goes_on_writing(path):
    store = FeedbackStore(path)
    store.save(event(answer("a"))).result()
    assert len(read_rows([path])) == 1
    assert store.save(event(answer("b"))).result().is_new
    store.close()


def test_the_command_writes_counts_and_conflicts(path, tmp_path):
    filled(
        path,
        event(answer("a", text="bad"), correction="good"),
        event(answer("b"), thumb=1),
        event(answer("b"), thumb=-1, rater="bob"),
    )
    out = tmp_path / "pairs.jsonl"
    done = run("data", "feedback", "--db", path, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "3 opinions read, 1 pair written (1 correction)" in done.stderr
    assert f"left out: {identity('b')}: liked by some, disliked by others (ann, bob)" in done.stderr
    assert [line["chosen"] for line in lines_of(out.read_text())] == ["good"]
    told = json.loads(run("data", "feedback", "--db", path, "--out", out, "--format", "sft", "--json").stdout)
    assert (told["opinions"], told["written"], len(told["conflicts"])) == (3, 1, 1)


@pytest.mark.parametrize(
    ("options", "told", "code"),
    [
        (["--format", "xml"], "none of pairs, sft, jsonl, csv", 2),
        (["--since", "yesterday"], "must be a date like", 2),
        (["--min-rating", "6"], "'--min-rating'", 2),
        (["--out", "/nowhere/x"], "cannot be written", 1),
        (["--db", "/nowhere/x.db"], "there is no feedback file", 1),
    ],
)
def test_a_wrong_option_of_the_command_is_one_clear_line(path, tmp_path, options, told, code):
    filled(path, event(answer("a")))
    out = tmp_path / "x"
    out.write_text("as it was")
    done = run("data", "feedback", "--db", path, "--out", out, *options)
    assert done.returncode == code
    assert told in done.stderr and "Traceback" not in done.stderr
    assert out.read_text() == "as it was"
