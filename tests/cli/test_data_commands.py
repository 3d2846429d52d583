"""`chatglm data prepare | inspect | mix | check` as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from chatglm.cli import main
from command_line import AtTerminal
from command_line import run as run_program


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The program in this process: a new one would load torch again each time."""

    def run(*words: str | Path) -> Done:
        with pytest.raises(SystemExit) as left:
            main(list(map(str, words)))
        said = capsys.readouterr()
        return Done(int(left.value.code or 0), said.out, said.err)

    return run


Run = Callable[..., Done]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [{"prompt": f"Question {number}?", "response": f"Answer {number}."} for number in range(20)]
    lines += [{"text": f"A text about {number} things. " * 5} for number in range(20)]
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


@pytest.fixture
def prepared(corpus: Path, tmp_path: Path, run: Run) -> Path:
    done = run("data", "prepare", corpus, "--out", tmp_path / "set", "--length", "128", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Saved to {tmp_path / 'set'}: 20 texts (")
    assert "20 samples of dialogues (" in done.stdout
    assert f"Try: chatglm data inspect {tmp_path / 'set'}" in done.stderr
    return tmp_path / "set"


def test_prepare_says_facts_as_json_and_reads_stdin(corpus: Path, tmp_path: Path) -> None:
    done = run_program(
        "data", "prepare", "-", "--out", tmp_path / "set", "--json", "--workers", "1", stdin=corpus.read_bytes()
    )
    facts = json.loads(done.stdout)
    assert (facts["texts"], facts["samples"], facts["problems"]) == (20, 20, {})
    assert facts["tokens_per_s"] > 0


def test_prepare_stops_at_a_bad_line_and_goes_on_when_told(corpus: Path, tmp_path: Path, run: Run) -> None:
    corpus.write_text(corpus.read_text() + '{"prompt": "q"\n')
    words = ("data", "prepare", corpus, "--out", tmp_path / "set", "--workers", "1")
    done = run(*words)
    assert done.returncode == 1
    assert f"{corpus}, line 41: not JSON: Expecting ',' delimiter at column 15 [json]" in done.stderr
    assert "--allow json" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 5
    done = run(*words, "--allow", "json")
    assert done.returncode == 0
    assert "json: 1 left out" in done.stdout
    assert "tokens/s" not in done.stderr  # the blocks were there already


def test_inspect_shows_a_row_as_the_model_sees_it(prepared: Path, run: Run) -> None:
    done = run("data", "inspect", prepared, "--row", "0", "--row", "1", "--verify")
    assert done.returncode == 0, done.stderr
    assert "rows of 128 tokens an epoch" in done.stdout
    assert "[gMASK]" in done.stdout and "<sop>" in done.stdout and "<eop> (12005)" in done.stdout
    assert "Who sees whom" in done.stdout and "█" in done.stdout
    facts = json.loads(run("data", "inspect", prepared, "--json", "--objective", "gpt").stdout)
    samples = [sample for row in facts["rows"] for sample in row["samples"]]
    assert all(len(sample["ids"]) == len(sample["targets"]) == len(sample["positions"]) for sample in samples)
    assert len(facts["rows"][0]["mask"]) <= 72


def test_a_changed_file_is_found_by_inspect(prepared: Path, run: Run) -> None:
    shard = prepared / "text" / "tokens-00000.bin"
    shard.write_bytes(bytes(4) + shard.read_bytes()[4:])
    done = run("data", "inspect", prepared, "--verify", "--quiet")
    assert done.returncode == 1
    assert f"{shard}: sha256" in done.stdout


def test_mix_writes_shares_that_inspect_reads(prepared: Path, tmp_path: Path, run: Run) -> None:
    words = ("data", "mix", f"{prepared}:text=0.7", f"{prepared}:dialogue=0.3", "--length", "128")
    done = run(*words, "--out", tmp_path / "mixture.json", "--tokens", "100000", "--json")
    facts = json.loads(done.stdout)
    assert [fact["share"] for fact in facts["sets"]] == [0.7, 0.3]
    assert all(fact["epochs"] > 1 for fact in facts["sets"])
    done = run("data", "inspect", tmp_path / "mixture.json")
    assert done.returncode == 0, done.stderr
    done = run("data", "mix", f"{prepared}=much")
    assert done.returncode == 2 and "`much` is no weight" in done.stderr


def test_check_lists_problems_and_fails_unless_they_are_allowed(corpus: Path, tmp_path: Path, run: Run) -> None:
    assert run("data", "check", corpus).stdout.endswith("No problems.\n")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        '{"prompt": "q", "chosen": "good one", "rejected": "bad"}\n'
        '{"prompt": "q", "chosen": "bad", "rejected": "good one"}\n'
    )
    done = run("data", "check", pairs)
    assert done.returncode == 1
    assert f"{pairs}, line 2: prefers what {pairs}, line 1 rejects [contradiction]" in done.stdout
    assert "The longer answer is preferred in 50.0% of the pairs" in done.stdout
    facts = json.loads(run("data", "check", pairs, "--json", "--allow", "contradiction").stdout)
    assert facts["passed"] and facts["counts"] == {"contradiction": 1}
    done = run("data", "check", pairs, "--allow", "typos")
    assert done.returncode == 1 and "known: all, json" in done.stderr


def test_wrong_options_are_usage_errors(corpus: Path, tmp_path: Path, run: Run) -> None:
    for words, said in (
        (("--documents", "page"), "'page'; known: file, blank, line"),
        (("--encoding", "klingon"), "'klingon' is no encoding"),
        (("--response-column", "a"), "other columns need --prompt-column"),
    ):
        done = run("data", "prepare", corpus, "--out", tmp_path / "x", *words)
        assert done.returncode == 2
        assert said in " ".join(done.stderr.split())


def test_a_terminal_sees_a_table(prepared: Path) -> None:
    with AtTerminal("data", "inspect", prepared) as terminal:
        assert "predicts" in terminal.wait_for("Who sees whom")
