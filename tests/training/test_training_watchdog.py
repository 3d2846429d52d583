"""A process that hangs says where and ends; one that works is left alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chatglm.errors import TrainingError
from chatglm.training.loop import train
from chatglm.training.watchdog import HUNG, Watchdog
from tiny_runs import tiny_run, tiny_task

PATIENCE_S = 120.0
"""How long a test waits for what must come."""

HANGING = """
import sys, threading
from dataclasses import dataclass
from pathlib import Path
from chatglm.training.loop import train
from chatglm.training.watchdog import Watchdog
from tiny_runs import tiny_run, tiny_task

task = tiny_task()
rows = task.source.batch

class Lost:
    rows_per_epoch = None
    reads_ahead = False

    def batch(self, start, count):
        if start >= 16:
            wait_for_a_disk_that_never_answers()
        return rows(start, count)

def wait_for_a_disk_that_never_answers():
    threading.Event().wait()

task.source = Lost()
expect = Watchdog.expect

def impatient_at_last(self, what):
    self.limit_s = 3 if what == "step 3" else 600
    expect(self, what)

Watchdog.expect = impatient_at_last
train(task, tiny_run(Path(sys.argv[1]), save={"every": 1}, parallel={"stall_s": 600}))
"""


def test_a_step_that_hangs_is_reported_with_its_stack_and_ends_the_process(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tests)!r})\n{HANGING}", tmp_path],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert found.returncode == HUNG
    assert "process 0 of 1 hangs: step 3 has not ended within 3 s (parallel.stall_s)" in found.stderr
    assert "wait_for_a_disk_that_never_answers" in found.stderr and "Current thread" in found.stderr
    assert (tmp_path / "step-000002" / "manifest.json").exists()
    report = train(tiny_task(), tiny_run(tmp_path, steps=4))  # goes on
    assert [step for step, _ in report.losses] == [3, 4]


def test_a_part_that_ended_is_forgotten_and_the_one_that_hangs_is_told() -> None:
    told: list[str] = []
    ended = threading.Event()

    def end(report: str) -> None:
        told.append(report)
        ended.set()

    watchdog = Watchdog(600, "process 1 of 8", end)
    watchdog.expect("step 0")
    watchdog.expect("step 1")
    watchdog.limit_s = 0.05
    watchdog.expect("step 2")
    assert ended.wait(PATIENCE_S)
    watchdog.close()
    assert len(told) == 1 and told[0].startswith("process 1 of 8 hangs: step 2 has not ended within 0.05 s")


def test_nothing_is_watched_by_default_between_parts_and_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Watchdog(0, "process 0 of 1").thread is None
    told: list[str] = []
    watchdog = Watchdog(1e-3, "process 0 of 1", told.append)
    watchdog.expect(None)
    watchdog.close()
    assert not told and watchdog.thread is not None and not watchdog.thread.is_alive()
    train(tiny_task(), tiny_run(tmp_path, steps=2, parallel={"stall_s": 600}))
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_limit_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"parallel.stall_s"):
        tiny_run(tmp_path, parallel={"stall_s": -1})
