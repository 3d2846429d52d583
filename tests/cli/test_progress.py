"""The progress bar: for people only, after a moment, and gone in the end."""

from __future__ import annotations

import sys

import pytest

from chatglm.cli import progress
from chatglm.cli.progress import ProgressBar
from chatglm.cli.streams import Terminal
from command_line import AtTerminal

SLOW_JOB = """
import sys, time
from chatglm.cli import progress
from chatglm.cli.streams import Terminal
progress.PATIENCE_S = 0.0
with progress.ProgressBar(Terminal.detect(), unit=sys.argv[1]) as bar:
    bar.say("checking")
    input()
    for done in range(1, 4):
        bar(done * 10**9, 4 * 10**9, "loading weights")
        input()
print("end")
"""


@pytest.mark.parametrize("terminal", [Terminal(True, True, False), Terminal(True, True, True, quiet=True)])
def test_nothing_is_shown_in_a_pipe_or_when_quiet(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    with ProgressBar(terminal) as bar:
        bar.say("checking")
        bar(1, 2, "loading")
    assert capsys.readouterr() == ("", "")


def test_what_is_done_soon_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(Terminal(True, True, True)) as bar:
        bar(1, 2, "loading")
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("unit", "amount"), [("bytes", "3.0/4.0 GB"), ("prompts", "3000000000/4000000000")])
def test_a_line_then_a_bar_with_the_amount_then_nothing(unit: str, amount: str) -> None:
    with AtTerminal(unit, program=(sys.executable, "-c", SLOW_JOB), COLUMNS="110") as job:
        job.wait_for("checking …")
        job.type("\r")
        job.wait_for("loading weights")
        for _ in range(2):
            job.type("\r")
        job.wait_for(amount)
        job.type("\r")
        job.wait_for("end")
        assert job.raw.rstrip().endswith(b"\x1b[2Kend")  # the bar was erased
