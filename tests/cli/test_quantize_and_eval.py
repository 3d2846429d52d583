"""`chatglm quantize`, `chatglm eval`, and what `chatglm info` says of the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatglm.chat import EMBEDDED_MODEL
from chatglm.config import read_config
from checkpoint_folders import golden_copy, small_safetensors
from command_line import run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_safetensors(tmp_path / "model")


def test_int4_is_the_default_and_the_last_line_is_what_to_do_next(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("quantize", source, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Saved to {out}: INT4, groups of 16, embedding and head INT8, rtn, ")
    assert done.stderr == f"Try: chatglm chat {out}\n"
    assert run("verify", "--deep", out).returncode == 0


def test_every_option_reaches_the_result(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = tmp_path / "mine.jsonl"
    text.write_text('{"turns": [["a b c", "d e f g"]]}\n{"text": "h i j k"}\n', encoding="utf-8")
    words = ("--dtype", "int8", "--group-size", "8", "--embedding-bits", "4", "--method", "gptq", "--seed", "3")
    done = run("quantize", source, "--out", out, *words, "--calibration", text, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["bits"], facts["group_size"], facts["embedding_bits"], facts["method"]) == (8, 8, 4, "gptq")
    assert facts["calibration"]["seed"] == 3 and facts["calibration"]["files"][0]["file"] == "mine.jsonl"
    config = read_config(out / "config.json")
    assert (config.quantization_bit, config.quantization_group_size, config.embedding_bits) == (8, 8, 4)


def test_the_originals_packing_can_be_written(source: Path, tmp_path: Path) -> None:
    done = run("quantize", source, "--out", tmp_path / "out", "--format", "original", "--embedding-bits", "4", "--json")
    assert json.loads(done.stdout)["packing"] == "original"
    raw = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (raw["quantization_bit"], raw["quantization_embeddings"]) == (4, True)
    assert "quantization_group_size" not in raw and "quantization_embedding_bit" not in raw


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--format", "original", "--group-size", "8"), "--group-size out"),
        (("--dtype", "int3"), "'int3'; known: int8, int4"),
        (("--method", "awq"), "'awq'; known: rtn, gptq"),
    ],
)
def test_options_that_cannot_be_are_wrong_usage(
    source: Path, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    done = run("quantize", source, "--out", tmp_path / "out", *words)
    assert done.returncode == 2
    assert told in " ".join(done.stderr.split())


def test_a_group_size_that_does_not_divide_is_one_error_with_both_numbers(source: Path, tmp_path: Path) -> None:
    done = run("quantize", source, "--out", tmp_path / "out", "--group-size", "64")
    assert done.returncode == 1
    assert "`quantization_group_size` 64 does not divide `hidden_size` 16" in done.stderr
    assert "Traceback" not in done.stderr


def test_info_tells_how_a_checkpoint_was_quantised(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("quantize", source, "--out", out, "--method", "gptq")
    shown = run("info", out).stdout
    assert "INT4, groups of 16, embedding and head INT8" in shown
    assert "gptq" in shown and "calibration.jsonl" in shown and "chatglm 0." in shown
    facts = json.loads(run("info", out, "--json").stdout)
    assert facts["quantization"]["method"] == "gptq" and facts["quantization_group_size"] == 16
    assert len(facts["quantization"]["calibration"]["files"][0]["sha256"]) == 64


def test_info_of_an_original_checkpoint_has_no_record(tmp_path: Path) -> None:
    folder = golden_copy("int4-qe", tmp_path)
    assert "INT4, one scale a row (the original's packing), embedding and head INT4" in run("info", folder).stdout
    assert json.loads(run("info", folder, "--json").stdout)["quantization"] is None


def test_eval_prints_a_table_in_three_forms(tmp_path: Path) -> None:
    text = tmp_path / "mine.jsonl"
    text.write_text('{"turns": [["你好", "你好！我是ChatGLM。"]]}\n', encoding="utf-8")
    words = ("eval", "--forms", "fp16, int8", "--text", text, "--device", "cpu", "--threads", "1")
    plain = run(*words)
    assert plain.returncode == 0, plain.stderr
    assert [line.split()[0] for line in plain.stdout.splitlines()] == ["weights", "fp16", "int8"]
    assert "1 file scored on cpu" in plain.stderr
    markdown = run(*words, "--markdown", "--out", tmp_path / "table.md")
    assert markdown.stdout.startswith("| weights | size | perplexity |")
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == markdown.stdout
    report = json.loads(run(*words, "--json").stdout)
    assert [row["form"] for row in report["rows"]] == ["fp16", "int8"] and report["files"][0]["file"] == "mine.jsonl"


def test_eval_of_several_models_compares_them_as_stored(tmp_path: Path) -> None:
    out = tmp_path / "four"
    run("quantize", EMBEDDED_MODEL, "--out", out)
    done = run("eval", EMBEDDED_MODEL, out, "--most", "1", "--json", "--threads", "1")
    assert [row["form"] for row in json.loads(done.stdout)["rows"]] == ["mini", "four"]
    assert run("eval", EMBEDDED_MODEL, out, "--forms", "int8").returncode == 2


def test_eval_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    done = run("eval", "--forms", "int5")
    assert done.returncode == 1 and "'int5' is no form of weights" in done.stderr
    assert run("eval", "--suite", "general").returncode == 2
    done = run("eval", "--text", tmp_path / "absent.txt")
    assert done.returncode == 1 and "absent.txt cannot be read" in done.stderr


def test_answers_are_measured_and_written(tmp_path: Path) -> None:
    for name in ("jieba", "nltk", "rouge_chinese"):
        pytest.importorskip(name)
    questions, said = tmp_path / "questions.jsonl", tmp_path / "said.jsonl"
    questions.write_text('{"prompt": "你好", "response": "你好！"}\n', encoding="utf-8")
    rules = "full_sentence,max_characters=60"
    done = run("eval", "--suite", "answers", "--data", questions, "--judge", rules, "--predictions", said, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (row,) = report["rows"]
    assert row["judged"] in (0.0, 1.0) and 0 <= row["bleu-4"] <= 100 and report["questions"] == 1
    (line,) = said.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["labels"] == "你好！" and json.loads(line)["predict"][0]


def test_wrong_suites_and_rules_are_refused_by_name(tmp_path: Path) -> None:
    assert "needs --data" in run("eval", "--suite", "answers").stderr
    done = run("eval", "--suite", "answers", "--data", tmp_path / "x", "--judge", "longer=3")
    assert done.returncode == 2 and "unknown key `longer`" in done.stderr
