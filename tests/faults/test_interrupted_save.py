"""A save that is interrupted, or has no room, leaves the old checkpoint or the new one: never half of either."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chatglm.checkpoint import atomic, convert, open_checkpoint, random_checkpoint, save, saving, verify
from chatglm.checkpoint.atomic import write_whole
from chatglm.checkpoint.reading import read_tensor
from chatglm.errors import CheckpointError
from checkpoint_folders import MODELS, SMALL
from golden_vectors import GOLDEN

TOKENIZER = GOLDEN / "tokenizer-reduced" / "ice_text.model"
BIAS = "transformer.final_layernorm.bias"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def breaking(error: BaseException) -> Iterator[tuple[str, Tensor]]:
    for k in range(6):
        yield f"tensor.{k}", torch.zeros(300)
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no"), MemoryError()], ids=repr)
@pytest.mark.parametrize("is_there", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: BaseException, is_there: bool) -> None:
    target = tmp_path / "model"
    if is_there:
        random_checkpoint(target, SMALL, seed=1, tokenizer_file=TOKENIZER)
    before = snapshot(target) if is_there else None
    with pytest.raises(type(error)):
        save(target, breaking(error), SMALL, max_shard_bytes=2_000, overwrite=True)
    assert (snapshot(target) if target.exists() else None) == before
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if is_there else [])


KILLED = """
import sys
from pathlib import Path
from checkpoint_folders import SMALL
from chatglm.checkpoint import random_checkpoint
target, seed = sys.argv[1:]
seed = int(seed)
while True:
    seed += 1
    tokenizer = target + "-tokenizer/ice_text.model"
    random_checkpoint(target, SMALL, seed=seed, tokenizer_file=tokenizer, overwrite=True)
    print(seed, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    """Saves over and over until killed, at five moments: whatever is there is whole, and the next save cleans up."""
    target = tmp_path / "model"
    shutil.copytree(TOKENIZER.parent, tmp_path / "model-tokenizer")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for count in range(1, 6):
        run = [sys.executable, "-c", KILLED, str(target), str(100 * count)]
        with subprocess.Popen(run, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for _ in range(count):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        assert verify(target, deep=True) == []
    random_checkpoint(target, SMALL, tokenizer_file=TOKENIZER, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-tokenizer"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replacing_keeps_other_files_and_drops_old_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    target = random_checkpoint(tmp_path / "model", SMALL, seed=1, tokenizer_file=TOKENIZER)
    assert len(list(target.glob("*.bin"))) > 1
    (target / "notes.txt").write_text("mine")
    convert(MODELS / "base-fp16", target, overwrite=True)
    names = {path.name for path in target.iterdir()}
    assert names == {"config.json", "model.safetensors", "notes.txt"}
    assert (target / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_an_exchange_a_failed_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    target = random_checkpoint(tmp_path / "model", SMALL, seed=1)
    before, rename = snapshot(target), os.rename

    def fail(source: Any, to: Any) -> None:
        if str(source).endswith(".saving"):
            raise OSError("no")
        rename(source, to)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        random_checkpoint(target, SMALL, seed=2, overwrite=True)
    assert snapshot(target) == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_files_are_copied_where_the_disk_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = random_checkpoint(tmp_path / "model", SMALL)
    (target / "notes.txt").write_text("mine")

    def no_links(*arguments: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", no_links)
    random_checkpoint(target, SMALL, seed=2, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("library", [None, "empty"])
def test_a_system_without_an_exchange_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str | None
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    if library is None:
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *a, **k: object())
    assert atomic._exchange(first, second) is False


def test_a_folder_can_be_saved_into_when_it_holds_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    random_checkpoint(tmp_path / "model", SMALL)
    assert (tmp_path / "model" / "notes.txt").exists() and open_checkpoint(tmp_path / "model").tensors


def test_a_checkpoint_is_never_replaced_unasked(tmp_path: Path) -> None:
    target = random_checkpoint(tmp_path / "model", SMALL)
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        random_checkpoint(target, SMALL)
    (target / "checkpoint-10").mkdir()
    with pytest.raises(CheckpointError, match="holds folders"):
        random_checkpoint(target, SMALL, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        random_checkpoint(tmp_path / "file", SMALL)


def test_free_disk_is_checked_first_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=12_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    drawn: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        drawn.append(1)
        yield BIAS, torch.zeros(3)

    with pytest.raises(CheckpointError, match=r"model needs 13\.42 GB, but 12\.00 MB are free there"):
        save(tmp_path / "deep" / "model", stream(), SMALL, total_bytes=13_416_000_000)
    assert drawn == [] and list(tmp_path.iterdir()) == []


def test_a_stream_is_measured_by_the_arithmetic_of_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 2[0-9],[0-9]{3} bytes, but 1,000 bytes are free"):
        save(tmp_path / "model", iter([]), SMALL)
    with pytest.raises(CheckpointError, match=r"needs 8,[0-9]{3} bytes"):
        save(tmp_path / "model", [("a", torch.zeros(2_000))], SMALL)


def test_a_disk_that_fills_up_meanwhile_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = random_checkpoint(tmp_path / "model", SMALL)
    before = snapshot(target)

    def full(path: Path, tensors: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "write_safetensors", full)
    with pytest.raises(CheckpointError, match=r"the disk is full: .* needs .* are free") as refused:
        save(target, {BIAS: torch.zeros(3)}, SMALL, overwrite=True)
    assert "nothing was changed" in str(refused.value.cure)
    assert snapshot(target) == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_error_of_the_disk_comes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, tensors: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, "write_safetensors", broken)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path / "model", {BIAS: torch.zeros(3)}, SMALL)


def test_a_single_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(*arguments: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_saving_a_loaded_checkpoint_over_itself_works(tmp_path: Path) -> None:
    """The old files stay readable under their open handles; the new folder takes their place at the end."""
    target = random_checkpoint(tmp_path / "model", SMALL)
    source = open_checkpoint(target)
    stream = ((name, read_tensor(entry)) for name, entry in source.tensors.items())
    save(target, stream, SMALL, overwrite=True)
    assert open_checkpoint(target).tensors.keys() == source.tensors.keys() - {"lm_head.weight"}
