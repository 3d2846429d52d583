"""`info`, `verify` and `convert` on real folders."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from chatglm.checkpoint import open_checkpoint, verify
from chatglm.cli.convert import random_config
from chatglm.cli.info import gather, lines, released_config
from chatglm.cli.source_folder import EMBEDDED_MODEL
from chatglm.config import ModelConfig, read_config, to_original
from checkpoint_folders import SMALL, golden_copy, small_safetensors
from command_line import run

LIST_MODULES = (
    sys.executable,
    "-c",
    "import sys; from chatglm.cli import main\ntry: main()\nfinally: print(*sys.modules, sep='\\n', file=sys.stderr)",
)


def test_info_of_the_embedded_model_needs_no_torch() -> None:
    done = run("info", program=LIST_MODULES)
    assert done.returncode == 0
    assert "torch" not in done.stderr.split()
    for text in ("44,153,856", "embedding and head INT8", "slim", "12,344", "research and demonstration"):
        assert text in done.stdout
    assert f"Try: chatglm verify {EMBEDDED_MODEL}" in done.stderr


def test_info_has_the_memory_of_each_dtype_by_arithmetic(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_original(ModelConfig())))
    facts, problem = gather(tmp_path)
    assert facts["parameters"] == 6_173_286_400
    needed = {row["dtype"]: row for row in facts["memory"]}
    assert needed["fp16"]["weights"] == 2 * 6_173_286_400
    assert needed["fp32"]["weights"] == 4 * 6_173_286_400
    assert needed["fp16"]["cache"] == 2_048 * 28 * 2 * 4_096 * 2
    assert 3.0e9 < needed["int4"]["weights"] < 4.0e9 < needed["int8"]["weights"] < 7.0e9
    assert problem is not None and "holds no weights" in str(problem)


def test_info_of_an_official_name_tells_its_memory_before_the_download(tmp_path: Path) -> None:
    done = run("info", "THUDM/chatglm-6b", HF_HOME=str(tmp_path))
    assert done.returncode == 0
    for text in ("is not downloaded", "6,173,286,400", "fp16", "13.29 GB"):
        assert text in done.stdout
    assert "Try: chatglm pull THUDM/chatglm-6b" in done.stderr
    other = run("info", "somebody/chatglm-7b", HF_HOME=str(tmp_path))
    assert other.returncode == 1
    assert "`chatglm pull somebody/chatglm-7b`" in other.stderr


def test_official_names_have_their_descriptions() -> None:
    assert released_config("THUDM/chatglm-6b") == ModelConfig()
    assert released_config("zai-org/chatglm-6b-int4") == ModelConfig(quantization_bit=4)
    assert released_config("THUDM/chatglm-6b-int4-qe") == ModelConfig(quantization_bit=4, quantization_embeddings=True)
    assert released_config("THUDM/chatglm2-6b") is released_config("THUDM/chatglm-6b-qe") is None


def test_info_of_a_folder_with_broken_weights_tells_both_and_fails(tmp_path: Path) -> None:
    folder = golden_copy("int4", tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 9000\n")
    done = run("info", folder)
    assert done.returncode == 1
    assert "quantised   INT4, one scale a row (the original's packing), embedding and head as floats" in done.stdout
    assert "Git-LFS pointer" in done.stderr
    assert "Git-LFS pointer" in json.loads(run("info", folder, "--json").stdout)["problem"]


def test_info_shows_licence_files_and_tokenizer_with_their_hashes(tmp_path: Path) -> None:
    folder = golden_copy("base-fp32", tmp_path)
    (folder / "MODEL_LICENSE").write_bytes(b"terms")
    shown = {line.split("  ")[0]: line for line in lines(gather(folder)[0])}
    assert shown["licence MODEL_LICENSE"].endswith(f"  sha256 {hashlib.sha256(b'terms').hexdigest()}")
    assert hashlib.sha256((folder / "ice_text.model").read_bytes()).hexdigest() in shown["tokenizer"]


def test_info_json_has_sizes_and_dtypes(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    facts = json.loads(run("info", folder, "--json").stdout)
    assert facts["files"] == [{"file": "pytorch_model.bin", "bytes": (folder / "pytorch_model.bin").stat().st_size}]
    assert set(facts["dtypes"]) <= {"float16", "float32"}
    assert facts["problem"] is None


def test_info_tells_the_sizes_of_a_tuned_prefix(tmp_path: Path) -> None:
    shown = "\n".join(lines(gather(golden_copy("ptuning", tmp_path))[0]))
    config = read_config(tmp_path / "ptuning" / "config.json")
    assert f"{config.pre_seq_len} vectors, without projection" in shown


def test_verify_of_a_whole_checkpoint_is_one_line_and_0(tmp_path: Path) -> None:
    folder = golden_copy("base-fp32", tmp_path)
    for words in (["verify", folder], ["verify", "--deep", folder]):
        done = run(*words)
        assert (done.returncode, done.stdout.count("\n")) == (0, 1)
        assert f"{folder} is fit to load" in done.stdout
        assert f"Try: chatglm chat {folder}" in done.stderr


def test_verify_tells_every_problem_with_file_and_cure_and_1(tmp_path: Path) -> None:
    folder = golden_copy("base-fp32", tmp_path)
    shard = folder / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    (folder / "ice_text.model").unlink()
    done = run("verify", folder)
    assert done.returncode == 1
    assert shard.name in done.stdout and "ice_text.model is missing" in done.stdout
    assert done.stdout.count("cure:") == 2
    assert "2 problems" in done.stderr
    problems = json.loads(run("verify", folder, "--json").stdout)["problems"]
    assert {problem["file"] for problem in problems} == {shard.name, "ice_text.model"}


def test_verify_of_nothing_is_an_error_with_a_cure(tmp_path: Path) -> None:
    done = run("verify", tmp_path / "none")
    assert done.returncode == 1
    assert "does not exist" in done.stderr and "cure:" in done.stderr


def test_convert_makes_safetensors_of_bin_files(tmp_path: Path) -> None:
    folder, out = golden_copy("base-fp32", tmp_path), tmp_path / "new"
    done = run("convert", folder, "--out", out)
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").is_file() and not list(out.glob("*.bin"))
    assert verify(out, deep=True) == []
    assert f"Try: chatglm verify {out} && chatglm chat {out}" in done.stderr


def test_convert_drops_the_image_tokens_of_the_first_release(tmp_path: Path) -> None:
    folder, out = golden_copy("preslim-full-vocab", tmp_path), tmp_path / "slim"
    done = run("convert", folder, "--to-slim", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "slim era" in done.stdout
    assert read_config(out / "config.json").vocab_size == 130_528


def test_convert_writes_random_weights_of_a_known_size(tmp_path: Path) -> None:
    done = run("convert", "--random", "mini", "--out", tmp_path / "r", "--format", "safetensors", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["era"] == "slim"
    assert open_checkpoint(tmp_path / "r").config.num_parameters == 44_153_856


def test_random_sizes_are_the_known_models() -> None:
    assert random_config("6b", None) == ModelConfig()
    assert random_config("6b-preslim", None).slim() == ModelConfig()
    assert random_config("6b-preslim", None).era == "pre-slim"
    assert random_config("6b", "int4").quantization_bit == 4


WRONG = {
    "nothing": ([], "name one of"),
    "two": (["x", "--random", "6b"], "name one of"),
    "prefix alone": (["--ptuning", "p"], "belong together"),
    "size": (["--random", "7b"], "known: 6b"),
    "format": (["x", "--format", "zip"], "known: safetensors"),
    "dtype": (["--random", "mini", "--dtype", "fp32"], "--random writes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_convert_refuses_wrong_usage(case: str, tmp_path: Path) -> None:
    words, said = WRONG[case]
    done = run("convert", *words, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_convert_does_not_replace_a_checkpoint_unasked(tmp_path: Path) -> None:
    folder, out = golden_copy("base-fp32", tmp_path), small_safetensors(tmp_path / "there", SMALL)
    done = run("convert", folder, "--out", out)
    assert done.returncode == 1
    assert "holds a checkpoint already" in done.stderr
    assert run("convert", folder, "--out", out, "--overwrite").returncode == 0
