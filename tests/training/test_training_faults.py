"""A run that is killed, stopped, out of disk, or finds a damaged checkpoint loses at most the last interval."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.errors import TrainingError
from chatglm.training import state
from chatglm.training.loop import train
from chatglm.training.state import Checkpoints, checkpoints, damage
from tiny_runs import is_equal, tiny_run, tiny_task, trained_weights, weights

EVERY_5 = {"save": {"every": 5}}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained_weights(tmp_path_factory.mktemp("whole"), **EVERY_5)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def between_steps(out: Path) -> None:
    """Killed before step 14."""
    task = tiny_task()
    task.before_step = lambda step: die() if step == 13 else None
    train(task, tiny_run(out, **EVERY_5))


def with_folder_begun(out: Path) -> None:
    """Killed when nothing of the checkpoint of step 10 but its folder is there."""
    task = tiny_task()
    task.on_checkpoint = lambda folder: die() if "000010" in folder.name else None
    train(task, tiny_run(out, **EVERY_5))


def with_tensors_written(out: Path) -> None:
    """Killed when the tensors of step 10 are written, and no manifest."""
    finish = Checkpoints._finish

    def dying(self: Checkpoints, temporary: Path, target: Path, facts: dict[str, Any]) -> None:
        if "000010" in target.name:
            die()
        finish(self, temporary, target, facts)

    Checkpoints._finish = dying  # type: ignore[method-assign]
    train(tiny_task(), tiny_run(out, **EVERY_5))


def before_the_rename(out: Path) -> None:
    """Killed when all of step 10 is written under its temporary name."""
    rename = Path.rename

    def dying(self: Path, target: Any) -> Path:
        if "000010" in str(target):
            die()
        return rename(self, target)

    Path.rename = dying  # type: ignore[method-assign]
    train(tiny_task(), tiny_run(out, **EVERY_5))


def with_the_background_writing(out: Path) -> None:
    """Killed a step after a checkpoint was begun in the background."""
    task = tiny_task()
    task.before_step = lambda step: die() if step == 11 else None
    train(task, tiny_run(out, save={"every": 5, "background": True}))


def with_sigterm(out: Path) -> None:
    """Asked to stop in the middle of step 13."""
    task = tiny_task()
    task.before_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 12 else None
    report = train(task, tiny_run(out, **EVERY_5))
    assert not report.finished and report.step == 13
    raise SystemExit(7)


@pytest.fixture(scope="module")
def in_a_process() -> Callable[[Callable[[Path], None], Path], int]:
    """Runs a function in a process of its own; returns its exit code (negative: the signal)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["chatglm.training.loop", "torch._dynamo"])  # imported once for all

    def run(function: Callable[[Path], None], out: Path) -> int:
        process = context.Process(target=function, args=(out,))
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    return run


@pytest.mark.parametrize(
    "killed",
    [between_steps, with_folder_begun, with_tensors_written, before_the_rename, with_the_background_writing],
)
def test_a_killed_run_goes_on_bitwise_from_its_last_checkpoint(
    killed: Callable[[Path], None], in_a_process: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    assert in_a_process(killed, tmp_path) == -signal.SIGKILL
    assert checkpoints(tmp_path), "the checkpoint before must be there"
    task = tiny_task(seed=5)
    report = train(task, tiny_run(tmp_path, **EVERY_5))
    first = report.losses[0][0]
    assert first in (6, 11)
    assert report.losses == uninterrupted[0].losses[first - 1 :]
    assert is_equal(weights(task), uninterrupted[1])


def test_sigterm_ends_the_step_and_leaves_a_checkpoint(in_a_process: Any, uninterrupted: Any, tmp_path: Path) -> None:
    assert in_a_process(with_sigterm, tmp_path) == 7
    assert checkpoints(tmp_path)[-1].name == "step-000013"
    task = tiny_task(seed=5)
    report = train(task, tiny_run(tmp_path, **EVERY_5))
    assert report.losses == uninterrupted[0].losses[13:]
    assert is_equal(weights(task), uninterrupted[1])


def break_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("hurt", "said"),
    [
        (lambda folder: break_a_byte(next(folder.glob("*.distcp"))), "another sha256"),
        (lambda folder: next(folder.glob("*.distcp")).write_bytes(b"short"), "has 5 bytes"),
        (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    hurt: Any, said: str, uninterrupted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained_weights(tmp_path, **EVERY_5)
    hurt(tmp_path / "step-000020")
    assert said in str(damage(tmp_path / "step-000020")) and damage(tmp_path / "step-000015") is None
    task = tiny_task(seed=5)
    with caplog.at_level(logging.WARNING):
        report = train(task, tiny_run(tmp_path, **EVERY_5))
    assert "step-000020 is damaged" in caplog.text and said in caplog.text
    assert report.losses == uninterrupted[0].losses[15:]
    assert is_equal(weights(task), uninterrupted[1])


def test_a_full_disk_is_said_before_writing_and_the_checkpoints_before_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_weights(tmp_path, **EVERY_5, steps=10, schedule={"kind": "constant"})
    usage = state.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(TrainingError, match=r"the disk is full: a checkpoint in .* needs .* are free"):
        trained_weights(tmp_path, **EVERY_5, schedule={"kind": "constant"})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000005", "step-000010"]
    assert all(damage(path) is None for path in checkpoints(tmp_path))


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_while_writing_is_the_same_error(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "save", full)
    with pytest.raises(TrainingError, match="the disk is full"):
        trained_weights(tmp_path, save={"every": 5, "background": background})
    assert checkpoints(tmp_path) == []


def test_a_real_full_file_system_is_the_same_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    task = tiny_task()

    def into_nothing(folder: Path) -> None:
        (folder / "__0_0.distcp").symlink_to("/dev/full")

    task.on_checkpoint = into_nothing
    with pytest.raises(TrainingError, match="the disk is full"):
        train(task, tiny_run(tmp_path, **EVERY_5))


def test_the_newest_two_checkpoints_and_every_tenth_step_stay(tmp_path: Path) -> None:
    trained_weights(tmp_path, save={"every": 3, "keep": 2, "keep_every": 6}, steps=20)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-0000{step:02d}" for step in (6, 12, 18, 20)]


def test_a_checkpoint_says_how_it_was_made(tmp_path: Path) -> None:
    trained_weights(tmp_path, steps=6)
    manifest = json.loads((tmp_path / "step-000006" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["place"]["position"] == 48
    assert manifest["settings"]["optimizer"]["lr"] == 3e-3
    assert manifest["torch"] == torch.__version__ and manifest["world_size"] == 1
    assert {".metadata", "__0_0.distcp"} == set(manifest["files"])
