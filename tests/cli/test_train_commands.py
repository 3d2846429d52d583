"""`chatglm train …` as a user runs it: the run, its report, its errors, Ctrl-C, two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import chatglm
from chatglm.cli.app import main
from chatglm.training.data import Preparation, prepare
from command_line import PROGRAM, environment

EMBEDDED = Path(chatglm.__file__).parent / "assets" / "mini"

RUN_FILE = """
out: {out}
steps: 6
model:
  tokenizer: embedded
  config: {{vocab_size: 12352, hidden_size: 32, num_layers: 2, num_heads: 4, inner_hidden_size: 64,
           max_sequence_length: 256, bos_token_id: 12004, eos_token_id: 12005, mask_token_id: 12000,
           gmask_token_id: 12001}}
data: {{train: {data}, held_out_rows: 2}}
batch: {{rows: 4, micro_rows: 2, length: 64}}
optimizer: {{lr: 3e-3}}
save: {{every: 3}}
evaluate: {{rows: 2}}
log: {{every: 2, tensorboard: false}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [f"Line {number} of a text about the number {number % 7}." for number in range(120)]
    (folder / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    prepare(Preparation((str(folder / "text.txt"),), EMBEDDED), folder / "text", workers=1)
    return folder / "text"


@pytest.fixture
def run_file(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE.format(out=tmp_path / "out", data=data), encoding="utf-8")
    return path


Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Train:
    """The program inside this process: starting it anew would cost more than the runs."""

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        torch.set_num_threads(1)
        with pytest.raises(SystemExit) as leaving:
            main(["train", *map(str, words)])
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(leaving.value.code or 0), shown.out, shown.err)

    return run


def test_a_run_tells_its_steps_ends_with_a_report_and_says_what_to_try_next(
    train: Train, run_file: Path, tmp_path: Path
) -> None:
    done = train("pretrain", run_file)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("step 2/6 · loss ")
    assert done.stderr.splitlines()[-1] == f"Try: chatglm chat {tmp_path / 'out' / 'model'}"
    assert done.stdout.startswith("Done: step 6, ") and f"Saved to {tmp_path / 'out' / 'model'}" in done.stdout
    assert (tmp_path / "out" / "step-000006" / "manifest.json").is_file()
    drawn = train("plot", tmp_path / "out", "--json")
    assert json.loads(drawn.stdout)["picture"] == str(tmp_path / "out" / "curves.png")


def test_a_dry_run_tells_memory_time_and_data_and_writes_nothing(train: Train, run_file: Path, tmp_path: Path) -> None:
    done = train("pretrain", run_file, "--dry-run", "--json", "--steps", "10", "--set", "batch.rows=8")
    told = json.loads(done.stdout)
    assert told["forecast"]["steps"] == 10 and told["forecast"]["tokens_per_step"] == 8 * 64
    assert told["data"]["epochs"] == pytest.approx(80 / told["data"]["rows_per_epoch"])
    assert not (tmp_path / "out").exists()
    assert "memory" in train("pretrain", run_file, "--dry-run").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "optimiser.lr=1"], "unknown key `optimiser`\n  cure: did you mean `optimizer`?"),
        (["--set", "batch.micro=1"], "unknown key `batch.micro`\n  cure: did you mean `batch.micro_rows`?"),
        (["--precision", "fp8"], "`compute.precision` is 'fp8'; allowed: auto, fp32, bf16, fp16"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_message_with_a_cure(train: Train, words: list[str], said: str, run_file: Path) -> None:
    done = train("pretrain", run_file, *words)
    assert done.returncode == 1 and done.stdout == ""
    assert said in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on(train: Train, run_file: Path, tmp_path: Path) -> None:
    words = ["pretrain", str(run_file), "--steps", "100000", "--json"]
    process = subprocess.Popen(
        [*PROGRAM, "train", *words],
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("step 2/")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    report = json.loads(out)
    assert process.returncode == 130 and not report["finished"] and report["step"] >= 2
    assert (tmp_path / "out" / f"step-{report['step']:06d}" / "manifest.json").is_file()
    again = train("pretrain", run_file, "--steps", str(report["step"] + 1), "--json")
    assert "resuming step-" in again.stderr.splitlines()[0]
    assert json.loads(again.stdout)["step"] == report["step"] + 1


def test_torchrun_trains_with_two_processes_and_one_reports(train: Train, run_file: Path, tmp_path: Path) -> None:
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [*starter, "--nproc-per-node", "2", "-m", "chatglm.cli", "train", "pretrain", str(run_file), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    together: dict[str, Any] = json.loads(done.stdout)
    alone = json.loads(train("pretrain", run_file, "--out", tmp_path / "alone", "--json").stdout)
    assert together["finished"] and together["tokens"] == alone["tokens"]
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
