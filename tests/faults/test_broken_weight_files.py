"""Weight files that are missing, cut, damaged, foreign or hostile: one clear error each, before any weight is read."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.checkpoint import Problem, check, open_checkpoint, verify
from chatglm.checkpoint.reading import read_chunks, read_tensor
from chatglm.checkpoint.tensor_file import list_tensors
from chatglm.config import ModelConfig, to_original
from chatglm.errors import CheckpointError
from checkpoint_folders import edit_json, golden_copy, small_safetensors

SHARD = "pytorch_model-00002-of-00002.bin"
LOST = "transformer.layers.1.post_attention_layernorm.bias [48]"
"""The first tensor of that shard."""

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:8678043a60cd2ce373543fffe8de9508a8cf4266d2c0f088d52167cae74af839\nsize 1879731432\n"
)


def only_problem(folder: Path, **options: Any) -> Problem:
    """The one problem of a folder; what is said of it is short, names the file and has a cure."""
    problems = verify(folder, **options)
    assert len(problems) == 1, [str(problem) for problem in problems]
    said = str(problems[0])
    assert len(said.splitlines()) <= 5 and said.startswith(problems[0].file) and "\n  cure: " in said
    return problems[0]


def sharded(tmp_path: Path) -> Path:
    return golden_copy("base-fp32", tmp_path)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "pointer": (
        lambda path: path.write_text(POINTER),
        r"is a Git-LFS pointer \(135 bytes\), not weights \(1,879,731,432 bytes\)",
    ),
    "empty": (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "truncated": (cut_in_half, "is truncated or damaged: [0-9,]+ bytes without the directory that ends a zip file"),
    "one byte short": (lambda path: os.truncate(path, path.stat().st_size - 1), "is truncated or damaged"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><title>404</title>"), "is a web page"),
    "noise": (lambda path: path.write_bytes(bytes(range(7, 107))), "is no torch file: 100 bytes that start with 07 08"),
    "another zip": (lambda path: write_zip(path, {"readme.txt": b"x"}), "is a zip file, but not one of torch"),
    "old torch": (
        lambda path: torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
        "in the form from before 2020",
    ),
    "damaged pickle": (
        lambda path: edit_record(path, "data.pkl", b"\x80\x02}q\x00X\xff"),
        "has a damaged list of tensors",
    ),
    "big-endian": (lambda path: edit_record(path, "byteorder", b"big"), "was written on a big-endian machine"),
    "a list": (lambda path: torch.save([torch.ones(2)], path), "holds a list, not named tensors"),
    "a number": (lambda path: torch.save({"step": 3}, path), "holds int under 'step', not a tensor"),
    "nested": (lambda path: torch.save({"model": {"a": torch.ones(2)}}, path), "holds dict under 'model'"),
}


def write_zip(path: Path, records: dict[str, bytes]) -> None:
    path.unlink(missing_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def records_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def edit_record(path: Path, ending: str, data: bytes | None) -> None:
    records = records_of(path)
    name = next(name for name in records if name.endswith(ending))
    write_zip(path, {key: data if key == name else old for key, old in records.items() if data or key != name})  # type: ignore[misc]


@pytest.mark.parametrize(("damage", "message"), BREAKS.values(), ids=BREAKS)
def test_a_broken_shard_is_one_problem_with_file_tensor_and_cure(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = sharded(tmp_path)
    damage(folder / SHARD)
    problem = only_problem(folder)
    assert problem.file == SHARD and re.search(message, problem.what)
    assert problem.tensor == f"{LOST} (and 19 more)"
    with pytest.raises(CheckpointError, match=re.escape(problem.message())) as refused:
        check(folder)
    assert refused.value.cure == problem.cure
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_the_cures_name_a_command(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / SHARD).write_text(POINTER)
    assert only_problem(folder).cure == f"run `git lfs pull` in {folder}, or `chatglm pull THUDM/chatglm-6b`"
    (folder / SHARD).unlink()
    assert "`chatglm pull THUDM/chatglm-6b`" in only_problem(folder).cure


def test_several_problems_are_raised_as_the_first_and_a_number(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / SHARD).unlink()
    (folder / "ice_text.model").unlink()
    (folder / SHARD.replace("02-of", "01-of")).write_text(POINTER)
    assert len(verify(folder)) == 3
    with pytest.raises(CheckpointError, match="and 2 more problems: `chatglm verify") as refused:
        check(folder)
    assert len(str(refused.value).splitlines()) <= 5
    assert len(verify(folder, tokenizer=False)) == 2
    with pytest.raises(CheckpointError, match="and 1 more problem: "):
        check(folder, tokenizer=False)


def test_a_shard_of_a_known_release_is_truncated_at_n_of_m_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_original(ModelConfig())))
    for k in range(1, 9):
        (tmp_path / f"pytorch_model-{k:05d}-of-00008.bin").write_bytes(b"PK\x03\x04" + bytes(996))
    (tmp_path / "pytorch_model-00002-of-00008.bin").write_bytes(b"")
    said = [str(problem) for problem in verify(tmp_path, tokenizer=False)]
    assert len(said) == 8  # and not the tensors that are missing with them
    assert said[2].startswith("pytorch_model-00003-of-00008.bin is truncated at 1,000 of 1,980,385,902 bytes\n")
    assert said[1].startswith("pytorch_model-00002-of-00008.bin is empty (0 of 1,879,731,432 bytes)\n")


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sharded(tmp_path)
    inner = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == SHARD:
            raise PermissionError(13, "Permission denied")
        return inner(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert only_problem(folder).what == "cannot be read (Permission denied)"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data[: len(data) // 2], r"is truncated at [0-9,]+ of [0-9,]+ bytes"),
        (lambda data: data + b"xyz", "has 3 bytes too many"),
        (lambda data: data[:100], r"is truncated at 100 bytes, inside its header of [0-9,]+"),
        (lambda data: b"\xff" * 8 + data[8:], "a header of 18,446,744,073,709,551,615 bytes is impossible"),
        (lambda data: data[:8] + b"?" + data[9:], "has a damaged header"),
        (lambda data: data.replace(b'"F16"', b'"F17"', 1), "has a damaged header .*the dtype F17"),
        (lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[2,', 1), "has a damaged header"),
        (lambda data: data.replace(b'"shape"', b'"shaqe"', 1), "has a damaged header"),
    ],
)
def test_a_broken_safetensors_file_is_one_problem(tmp_path: Path, edit: Callable[[bytes], bytes], message: str) -> None:
    folder = small_safetensors(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))
    problem = only_problem(folder)
    assert problem.file == "model.safetensors" and re.search(message, problem.what)


def test_a_truncated_safetensors_file_names_the_tensors_that_are_cut(tmp_path: Path) -> None:
    folder = small_safetensors(tmp_path / "model")
    entries = list_tensors(folder / "model.safetensors")
    last = max(entries.values(), key=lambda entry: entry.offset)
    os.truncate(folder / "model.safetensors", last.offset + 1)
    assert only_problem(folder).tensor == str(last)


def test_a_record_that_was_lost_or_shortened_names_its_tensor(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    edit_record(path, "/data/0", None)
    problem = only_problem(folder)
    assert problem.what == "lacks the bytes of a tensor" and problem.tensor == "transformer.word_embeddings.weight"
    path.write_bytes(whole)
    edit_record(path, "/data/0", b"short")
    problem = only_problem(folder)
    assert "a record of 5 bytes is too short" in problem.what and "word_embeddings" in problem.tensor


def test_a_record_header_that_was_overwritten_is_noticed(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        offset = next(info.header_offset for info in archive.infolist() if info.filename.endswith("/data/5"))
    data = bytearray(path.read_bytes())
    data[offset : offset + 4] = b"\0\0\0\0"
    path.write_bytes(data)
    assert only_problem(folder).what == "is damaged: no record where its directory says"


def test_a_compressed_record_is_not_read_as_if_it_were_plain(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    path = folder / "pytorch_model.bin"
    records = records_of(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    assert only_problem(folder).what == "is compressed, which torch never does"


def test_a_damaged_list_of_tensors_is_noticed_by_its_checksum(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    path = folder / "pytorch_model.bin"
    data = path.read_bytes()
    assert data.count(b"dense_4h_to_h.bias") == 3
    path.write_bytes(data.replace(b"dense_4h_to_h.bias", b"dense_4h_to_h.bixs"))
    assert "is damaged: its record pytorch_model/data.pkl is not" in only_problem(folder).what


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    entry = open_checkpoint(folder).tensors["transformer.word_embeddings.weight"]
    os.truncate(entry.file, entry.offset + 10)
    for read in (lambda: read_tensor(entry), lambda: list(read_chunks(entry, 1_000))):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin ended at [0-9,]+ bytes while it was read"):
            read()


class _Hostile:
    """Pickles as a call; loading it the ordinary way would make the call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile_bin(path: Path, payload: Any) -> None:
    """A torch zip file whose list of tensors holds `payload`."""
    records = records_of(path)
    name = next(name for name in records if name.endswith("data.pkl"))
    write_zip(path, records | {name: pickle.dumps(payload, protocol=2)})


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (lambda flag: {"a": _Hostile(os.system, f"touch {flag}")}, "system"),
        (lambda flag: _Hostile(eval, f"open({str(flag)!r}, 'w')"), "eval"),
        (lambda flag: OrderedDict(a=_Hostile(open, str(flag), "w")), "open"),
        (lambda flag: _Hostile(torch.load, str(flag)), "load"),
        (lambda flag: {"a": _Hostile(getattr, "text", "upper")}, "getattr"),
    ],
)
def test_a_checkpoint_cannot_run_code(tmp_path: Path, payload: Callable[[Path], Any], name: str) -> None:
    folder, flag = golden_copy("base-fp16", tmp_path), tmp_path / "was-run"
    hostile_bin(folder / "pytorch_model.bin", payload(flag))
    problem = only_problem(folder)
    assert re.match(rf"asks for `[\w.]+\.{name}`, which is code and no tensor", problem.what), problem.what
    assert "it was not run" in problem.what and problem.cure.startswith("do not use this file")
    with pytest.raises(CheckpointError, match="is code and no tensor"):
        open_checkpoint(folder)
    assert not flag.exists()


@pytest.mark.parametrize(
    "described",
    [
        b"\x80\x02ctorch\nHalfStorage\n)R.",  # a storage type is nothing that can be called
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR.",  # no storage
        b"\x80\x02X\x04\x00\x00\x00nameQ.",  # a reference that is no storage
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nHalfStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuX\x01\x00\x00\x00xtQ.",
    ],
)
def test_a_pickle_that_makes_no_sense_is_damaged_and_never_a_traceback(tmp_path: Path, described: bytes) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    edit_record(folder / "pytorch_model.bin", "data.pkl", described)
    assert only_problem(folder).what.startswith("has a damaged list of tensors")


def test_negative_sizes_in_a_pickle_are_damaged(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    data = records_of(folder / "pytorch_model.bin")
    described = next(data[name] for name in data if name.endswith("data.pkl"))
    rows = b"M\x28\x02K\x20\x86"  # the shape (552, 32) of the embedding
    assert rows in described
    negative = described.replace(rows, b"J\xff\xff\xff\xffK\x20\x86")
    edit_record(folder / "pytorch_model.bin", "data.pkl", negative)
    assert "impossible sizes" in only_problem(folder).what


def test_the_index_may_be_wrong_about_a_tensor(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())["weight_map"]
    edit_json(folder / "pytorch_model.bin.index.json", weight_map=index | {"extra.weight": SHARD})
    assert verify(folder) == []  # the files decide
