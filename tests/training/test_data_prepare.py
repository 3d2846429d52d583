"""From files to a prepared set: the ids, the index, bad lines, archives, resuming."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chatglm
from chatglm.errors import TrainingError
from chatglm.tokenizer import Tokenizer, template
from chatglm.training.data import Allowance, Layout, Preparation, PreparedSet, Reading, prepare

TOKENIZER = Path(chatglm.__file__).parent / "assets" / "mini"
ANSWERS = [("What is one?", "One."), ("What is two?", "Two, of course."), ("你好", "你好！")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TOKENIZER)


def write_jsonl(path: Path, *objects: Any) -> Path:
    path.write_text("".join(json.dumps(found, ensure_ascii=False) + "\n" for found in objects), encoding="utf-8")
    return path


def dialogues(path: Path) -> Path:
    return write_jsonl(path, *({"prompt": question, "response": answer} for question, answer in ANSWERS))


def prepared(tmp_path: Path, *inputs: Path | str, out: str = "set", workers: int = 1, **settings: Any) -> PreparedSet:
    settings.setdefault("layout", Layout(length=64))
    return prepare(Preparation(tuple(map(str, inputs)), TOKENIZER, **settings), tmp_path / out, workers=workers)


def documents(found: PreparedSet, part: str = "text") -> list[list[int]]:
    collection = found.collection(part)  # type: ignore[arg-type]
    return [collection.document(number).tolist() for number in range(len(collection))]


def contents(found: PreparedSet) -> dict[str, bytes]:
    """Every file of a set but the index, which tells the time."""
    files = sorted(path for path in found.folder.rglob("*") if path.is_file() and path.name != "index.json")
    return {str(path.relative_to(found.folder)): path.read_bytes() for path in files}


def test_an_answer_is_kept_as_its_context_and_itself(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = prepared(tmp_path, dialogues(tmp_path / "a.jsonl"))
    assert found.dialogue.documents == 3 and found.text.documents == 0
    for number, (question, answer) in enumerate(ANSWERS):
        context = [*tokenizer.encode(question), tokenizer.gmask_id]
        assert found.dialogue.document(number).tolist() == [*context, *tokenizer.encode(answer), tokenizer.eop_id]
        assert found.dialogue.contexts[number] == len(context)
        assert found.dialogue.place(number) == (0, number + 1)
    assert found.index["files"] == [str(tmp_path / "a.jsonl")]
    assert found.index["dialogue"]["bytes"] == sum(len(answer.encode()) for _, answer in ANSWERS)
    assert found.index["ids"]["eop"] == tokenizer.eop_id
    assert found.verify() == []


def test_a_dialogue_has_a_sample_for_each_answer_in_the_chat_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"turns": [["a b", "c"], ["d", "e f"]], "source": "mine"})
    found = prepared(tmp_path, file)
    contexts = [template.render("a b"), template.render("d", [("a b", "c")])]
    expected = [
        [*tokenizer.encode_context(context)[:-1], *tokenizer.encode(answer), tokenizer.eop_id]
        for context, answer in zip(contexts, ["c", "e f"], strict=True)
    ]
    assert documents(found, "dialogue") == expected
    assert found.sources == ["mine"]
    last = prepared(tmp_path, file, out="last", layout=Layout(length=64, every_answer=False))
    assert documents(last, "dialogue") == expected[1:]


def test_the_oldest_rounds_are_left_out_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rounds = [["first question " * 25, "first answer"], ["second question", "second answer"], ["third", "answer"]]
    found = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", {"turns": rounds}))
    question = template.render("third", [("second question", "second answer")])
    expected = [*tokenizer.encode(question), tokenizer.gmask_id, *tokenizer.encode("answer"), tokenizer.eop_id]
    assert found.dialogue.document(2).tolist() == expected
    assert found.index["samples_with_dropped_rounds"] == 2


def test_official_layout_cuts_and_numbers_as_the_original_script(tmp_path: Path, tokenizer: Tokenizer) -> None:
    official = Layout(official=True, max_source_length=8, max_target_length=6)
    file = write_jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "one two three four five six seven eight nine ten", "response": "a b c d e f g h i j k l"},
        {"prompt": "hello", "response": "you", "history": []},
    )
    found = prepared(tmp_path, file, layout=official)
    long = found.dialogue.document(0).tolist()
    question = tokenizer.encode("one two three four five six seven eight nine ten")
    answer = tokenizer.encode("a b c d e f g h i j k l")
    assert long == [*question[:7], tokenizer.gmask_id, *answer[:4], tokenizer.eop_id]
    assert found.dialogue.document(1).tolist()[:7] == tokenizer.encode("[Round 0]\n问：hello\n答：")[:7]


def test_texts_end_with_the_end_of_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "Some text.\nMore."}, {"text": "另一个"})
    found = prepared(tmp_path, file)
    end = tokenizer.piece_to_id("</s>")
    assert documents(found) == [[*tokenizer.encode("Some text.\nMore."), end], [*tokenizer.encode("另一个"), end]]
    other = prepared(tmp_path, file, out="eop", end_of_text="<eop>")
    assert other.text.document(0)[-1] == tokenizer.eop_id


@pytest.mark.parametrize(
    ("separation", "texts", "lines"),
    [
        ("file", ["one\ntwo\n\nthree\n\n\nfour"], [1]),
        ("blank", ["one\ntwo", "three", "four"], [1, 4, 7]),
        ("line", ["one", "two", "three", "four"], [1, 2, 4, 7]),
    ],
)
def test_what_ends_a_document_of_plain_text(
    tmp_path: Path, tokenizer: Tokenizer, separation: Any, texts: list[str], lines: list[int]
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n\r\n\r\nfour\r\n")
    found = prepared(tmp_path, file, reading=Reading(separation=separation))
    assert documents(found) == [[*tokenizer.encode(text), tokenizer.piece_to_id("</s>")] for text in texts]
    assert [found.text.place(number)[1] for number in range(len(texts))] == lines


def test_a_document_larger_than_a_block_is_one_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "".join(f"This is line {number} of a long text.\n" for number in range(400))
    (tmp_path / "a.txt").write_text(text)
    found = prepared(tmp_path, tmp_path / "a.txt", block_bytes=1000, shard_tokens=700)
    assert found.text.documents == 1
    assert len(found.text.shards) > 5
    ids = found.text.document(0)
    assert tokenizer.decode(ids[:-1]).strip().split() == text.split()
    assert (ids == tokenizer.piece_to_id("</s>")).sum() == 1


def packed(path: Path, content: bytes) -> Path:
    """A file compressed as its name says, in a tar where the name says so."""
    if ".tar" in path.name:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name in ("inside/data.jsonl", "inside/picture.png"):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        content = archive.getvalue()
    if path.suffix == ".zst":
        content = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.bz2", "a.jsonl.zst", "a.tar", "a.tar.xz", "a.tar.zst"]
)
def test_packed_files_give_what_plain_ones_give(tmp_path: Path, name: str) -> None:
    plain = dialogues(tmp_path / "plain.jsonl")
    found = prepared(tmp_path, packed(tmp_path / name, plain.read_bytes()))
    expected = prepared(tmp_path, plain, out="plain")
    assert documents(found, "dialogue") == documents(expected, "dialogue")


def test_json_arrays_keep_their_line_numbers(tmp_path: Path) -> None:
    objects = [{"prompt": f"question {number}", "response": f"answer {number}"} for number in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(objects, indent=2))
    found = prepared(tmp_path, tmp_path / "a.json", block_bytes=512)
    assert found.dialogue.documents == 50
    assert [found.dialogue.place(number)[1] for number in (0, 1, 49)] == [2, 6, 198]


def test_a_folder_is_read_in_order_and_named_sources_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", {"text": "second", "source": "kept"})
    write_jsonl(folder / "a.jsonl", {"text": "first", "source": "dropped:x"})
    (folder / "notes.pdf").write_bytes(b"%PDF")
    (folder / ".hidden.txt").write_text("hidden")
    found = prepared(tmp_path, folder)
    assert found.sources == ["dropped:x", "kept"]
    less = prepared(tmp_path, folder, out="less", reading=Reading(leave_out=("dropped:*",)))
    assert (less.sources, less.index["left_out"]) == (["kept"], 1)


BAD = {
    "json": b'{"prompt": "q", "response": ',
    "keys": b'{"promt": "q", "response": "a"}',
    "empty": b'{"prompt": "q", "response": ""}',
    "encoding": '{"prompt": "你好", "response": "好"}'.encode("gb18030"),
    "long": json.dumps({"prompt": "q", "response": "word " * 200}).encode(),
    "roles": b'{"messages": [{"role": "user", "content": "q"}]}',
    "duplicate": b'{"prompt": "What is one?", "response": "One."}',
    "contradiction": b'{"prompt": "What is one?", "response": "Eleven."}',
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_stops_the_run_with_file_and_line(tmp_path: Path, kind: str) -> None:
    file = dialogues(tmp_path / "a.jsonl")
    file.write_bytes(file.read_bytes() + b"\n" + BAD[kind] + b"\n")
    with pytest.raises(TrainingError, match=rf"a\.jsonl, line 5: .*\[{kind}\]") as error:
        prepared(tmp_path, file)
    assert error.value.cure is not None and f"--allow {kind}" in error.value.cure
    assert not (tmp_path / "set").exists()
    found = prepared(tmp_path, file, allowance=Allowance.parse([f"{kind}=1"]))
    assert found.index["problems"]["counts"] == {kind: 1}
    assert found.dialogue.documents == 3 + (kind == "contradiction")
    with pytest.raises(TrainingError, match=rf"\[{kind}\]"):
        prepared(tmp_path, file)  # the set is there, and has more problems than this command allows


def test_allowances_are_numbers_or_shares_of_the_records(tmp_path: Path) -> None:
    file = dialogues(tmp_path / "a.jsonl")
    file.write_bytes(file.read_bytes() + BAD["json"] + b"\n" + BAD["json"] + b"\n")
    for allowed in ("json=1", "json=30%", "empty"):
        with pytest.raises(TrainingError, match="so far: 2 json"):
            prepared(tmp_path, file, allowance=Allowance.parse([allowed]))
    assert prepared(tmp_path, file, allowance=Allowance.parse(["json=40%"])).dialogue.documents == 3
    with pytest.raises(TrainingError, match="no kind of problem called `typos`"):
        Allowance.parse(["typos"])


def test_lines_of_another_encoding_name_it(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(BAD["encoding"] + b"\n")
    with pytest.raises(TrainingError, match=r"not UTF-8; as gb18030 the line can be read \(`--encoding gb18030`\)"):
        prepared(tmp_path, file)
    found = prepared(tmp_path, file, reading=Reading(encoding="gb18030"))
    assert found.dialogue.documents == 1


def test_several_processes_write_the_set_that_one_writes(tmp_path: Path) -> None:
    lines = [{"text": f"Text number {number}. " * (number % 7 + 1)} for number in range(300)]
    file = write_jsonl(tmp_path / "a.jsonl", *lines)
    one = prepared(tmp_path, file, block_bytes=2000)
    several = prepared(tmp_path, file, out="several", block_bytes=2000, workers=2)
    assert contents(one) == contents(several)
    assert [one.text.place(number)[1] for number in range(300)] == list(range(1, 301))


def test_the_same_command_again_does_nothing_and_another_needs_overwrite(tmp_path: Path) -> None:
    file = dialogues(tmp_path / "a.jsonl")
    before = prepared(tmp_path, file).folder.stat().st_mtime_ns
    assert prepared(tmp_path, file).folder.stat().st_mtime_ns == before
    with pytest.raises(TrainingError, match="from files that have changed"):
        prepared(tmp_path, write_jsonl(file, {"text": "other"}))
    with pytest.raises(TrainingError, match="`<end>` is no piece"):
        prepared(tmp_path, file, end_of_text="<end>")
    with pytest.raises(TrainingError, match="prepared otherwise"):
        prepared(tmp_path, file, layout=Layout(length=32))
    preparation = Preparation((str(file),), TOKENIZER, Layout(length=32))
    assert prepare(preparation, tmp_path / "set", workers=1, overwrite=True).index["made_of"]["layout"]["length"] == 32
    with pytest.raises(TrainingError, match="exists and is no prepared data"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").touch()
        prepared(tmp_path, file, out="other")


def test_a_run_that_is_killed_goes_on_behind_its_last_block(tmp_path: Path) -> None:
    lines = [{"text": f"Text number {number}. " * 20} for number in range(400)]
    file = write_jsonl(tmp_path / "a.jsonl", *lines)
    out = tmp_path / "set"
    script = f"""
import os
from chatglm.training.data import Preparation, prepare
from pathlib import Path
def progress(done, total, what):
    print(what, flush=True)
prepare(Preparation(({str(file)!r},), Path({str(TOKENIZER)!r}), block_bytes=4000), Path({str(out)!r}), workers=1,
        progress=progress)
"""
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for _ in range(5):
        assert run.stdout.readline().strip() == "reading text"
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    partial = tmp_path / "set.partial"
    written = {path: path.stat().st_mtime_ns for path in partial.glob("block-*.npz")}
    assert len(written) >= 5 and not out.exists()
    survivor, damaged = sorted(written)[:2]
    damaged.write_bytes(damaged.read_bytes()[:100])
    seen: dict[Path, int] = {}

    def progress(done: int, total: int, what: str) -> None:
        if what == "writing shards" and not seen:
            seen.update({path: path.stat().st_mtime_ns for path in partial.glob("block-*.npz")})

    preparation = Preparation((str(file),), TOKENIZER, block_bytes=4000)
    found = prepare(preparation, out, workers=1, progress=progress)
    assert seen[survivor] == written[survivor] and seen[damaged] != written[damaged]
    assert not partial.exists()
    again = prepared(tmp_path, file, out="whole", block_bytes=4000, layout=Layout())
    assert contents(found) == contents(again)


def test_a_script_without_a_main_guard_may_use_workers_which_end_with_their_work(tmp_path: Path) -> None:
    lines = [{"text": f"Text number {number}. " * 20} for number in range(400)]
    file = write_jsonl(tmp_path / "a.jsonl", *lines)
    (tmp_path / "script.py").write_text(
        f"""
import multiprocessing, os, time
from chatglm.training.data import Preparation, prepare
print("started", flush=True)
def progress(done, total, what):
    children = [child.pid for child in multiprocessing.active_children()]
    if what == "writing shards":
        print(*children, flush=True)
        time.sleep(600)
prepare(Preparation(({str(file)!r},), {str(TOKENIZER)!r}, block_bytes=4000), {str(tmp_path / "set")!r}, workers=2,
        progress=progress)
"""
    )
    script = [sys.executable, str(tmp_path / "script.py")]
    run = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stderr is not None
    assert run.stdout.readline() == "started\n"
    said = run.stdout.readline()  # the second and last line: no worker has run the script again
    run.kill()
    run.wait()
    rest, errors = run.stdout.read(), run.stderr.read()
    run.stdout.close()
    run.stderr.close()
    assert (said.strip(), rest, errors) == ("", "", "")


def test_workers_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    lines = [{"text": f"Text number {number}. " * 20} for number in range(3000)]
    file = write_jsonl(tmp_path / "a.jsonl", *lines)
    script = f"""
import multiprocessing, time
from chatglm.training.data import Preparation, prepare
def progress(done, total, what):
    children = [child.pid for child in multiprocessing.active_children()]
    if len(children) == 2:
        print(*children, flush=True)
        time.sleep(600)
prepare(Preparation(({str(file)!r},), {str(TOKENIZER)!r}, block_bytes=4000), {str(tmp_path / "set")!r}, workers=2,
        progress=progress)
"""
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    workers = [int(word) for word in run.stdout.readline().split()]
    assert len(workers) == 2
    run.kill()
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 120
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [worker for worker in workers if is_running(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # gone since, or no such folder on this system
        return Path("/proc/self").exists() is False


def test_a_changed_corpus_is_read_again(tmp_path: Path) -> None:
    file = dialogues(tmp_path / "a.jsonl")
    file.write_bytes(file.read_bytes() + BAD["json"] + b"\n")
    with pytest.raises(TrainingError):
        prepared(tmp_path, file)
    write_jsonl(file, {"prompt": "new", "response": "line"})
    assert prepared(tmp_path, file).dialogue.documents == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is no text and no dialogue"),
        ("text".encode("utf-16"), "UTF-16"),
    ],
)
def test_input_that_is_nothing_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        prepared(tmp_path, tmp_path / "a.txt")


def test_a_damaged_archive_names_itself(tmp_path: Path) -> None:
    file = packed(tmp_path / "a.jsonl.xz", b'{"text": "some text that is long enough"}\n' * 100)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(TrainingError, match=r"a\.jsonl\.xz cannot be read to its end"):
        prepared(tmp_path, file)
    with pytest.raises(TrainingError, match=r"missing\.jsonl: no such file"):
        prepared(tmp_path, tmp_path / "missing.jsonl")


def test_a_set_with_a_short_or_changed_shard_is_found(tmp_path: Path) -> None:
    found = prepared(tmp_path, dialogues(tmp_path / "a.jsonl"))
    shard = found.folder / "dialogue" / "tokens-00000.bin"
    ids = np.fromfile(shard, dtype="<i4")
    ids[0] += 1
    ids.tofile(shard)
    assert [line.split(":")[0] for line in found.verify()] == [str(shard)]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(TrainingError, match="the index says"):
        PreparedSet.open(found.folder)


def test_a_large_text_ends_with_its_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("The first file.\n" * 40 + "\n" * 3000)
    (tmp_path / "b.txt").write_text("The second file.\n" * 3)
    found = prepared(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", block_bytes=500)
    assert found.text.documents == 2
    assert tokenizer.decode(found.text.document(0).tolist()).count("first") == 40
    assert tokenizer.decode(found.text.document(1).tolist()).count("second") == 3


def test_a_full_disk_is_one_message_and_loses_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"text": f"Text number {number}. " * 20} for number in range(40)]
    file = write_jsonl(tmp_path / "a.jsonl", *lines)
    replace, calls = os.replace, []

    def full(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 4:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(TrainingError, match=r"block-000002\.npz cannot be written \(No space left on device\)"):
            prepared(tmp_path, file, block_bytes=4000)
    found = prepared(tmp_path, file, block_bytes=4000)
    assert found.index["blocks_kept_from_before"] == 2
    assert found.text.documents == 40


def test_two_runs_never_write_one_set(tmp_path: Path) -> None:
    file = dialogues(tmp_path / "a.jsonl")
    said: list[str] = []

    def progress(done: int, total: int, what: str) -> None:
        if not said:
            with pytest.raises(TrainingError, match="is being prepared by another process") as error:
                prepared(tmp_path, file, layout=Layout(length=32))
            said.append(str(error.value))

    prepare(Preparation((str(file),), TOKENIZER), tmp_path / "set", workers=1, progress=progress)
    assert said and not (tmp_path / "set.partial").exists()
