"""J9: a P-tuning v2 result of 2023 and its base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from checkpoint_folders import edit_json, golden_copy
from command_line import run


def checkpoint_of_2023(tmp_path: Path) -> Path:
    """`checkpoint-N` as the official script left it: the prefix alone, and a config that says nothing of it."""
    folder = golden_copy("ptuning-prefix-only", tmp_path, tokenizer=False)
    edit_json(folder / "config.json", pre_seq_len=None, prefix_projection=None)
    return folder


def base_of(tmp_path: Path) -> Path:
    """The base model of the golden prefix: the same folder without its prefix."""
    import torch

    folder = golden_copy("ptuning", tmp_path)
    edit_json(folder / "config.json", pre_seq_len=None, prefix_projection=None)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: t for name, t in weights.items() if "prefix_encoder" not in name}, folder / "pytorch_model.bin")
    return folder


def test_tuned_prefix_is_merged_and_answers(tmp_path: Path) -> None:
    tuned, base, out = checkpoint_of_2023(tmp_path), base_of(tmp_path), tmp_path / "p1"
    done = run("convert", "--ptuning", tuned, "--base", base, "--out", out)
    assert done.returncode == 0, done.stderr
    sizes = json.loads((golden_copy("ptuning", tmp_path / "again") / "config.json").read_text())
    assert f"tuned prefix of {sizes['pre_seq_len']} vectors without projection" in done.stdout
    assert json.loads((out / "config.json").read_text())["pre_seq_len"] == sizes["pre_seq_len"]
    chat = run(
        "chat", "--adapter", out, "--max-new-tokens", "3", "--temperature", "0", "--threads", "1", stdin="你好\n"
    )
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.strip("\n") or "parameters" in chat.stderr


def test_a_prefix_answers_beside_the_base_that_is_named(tmp_path: Path) -> None:
    tuned, base = checkpoint_of_2023(tmp_path), base_of(tmp_path)
    short = ("--max-new-tokens", "3", "--temperature", "0", "--seed", "1", "--threads", "1")
    beside = run("chat", base, "--adapter", tuned, *short, "--json", stdin="你好\n")
    assert beside.returncode == 0, beside.stderr
    merged = run("convert", "--ptuning", tuned, "--base", base, "--out", tmp_path / "p1")
    assert merged.returncode == 0, merged.stderr
    assert beside.stdout == run("chat", tmp_path / "p1", *short, "--json", stdin="你好\n").stdout


def test_adapter_without_a_base_or_without_a_prefix_is_one_error_with_the_command(tmp_path: Path) -> None:
    tuned, base = checkpoint_of_2023(tmp_path), base_of(tmp_path)
    alone = run("chat", "--adapter", tuned)
    assert alone.returncode == 1
    assert "its base THUDM/chatglm-6b is not here" in alone.stderr
    assert f"chatglm convert --ptuning {tuned} --base MODEL --out DIR" in alone.stderr
    none = run("chat", "--adapter", base)
    assert none.returncode == 1
    assert "holds no tuned prefix" in none.stderr
    merged = run("convert", "--ptuning", tuned, "--base", base, "--out", tmp_path / "p1")
    assert merged.returncode == 0, merged.stderr
    both = run("chat", base, "--adapter", tmp_path / "p1")
    assert both.returncode == 2
    assert "holds its base model" in both.stderr


def test_prefix_for_another_base_is_one_error_that_names_both_shapes(tmp_path: Path) -> None:
    tuned, other = checkpoint_of_2023(tmp_path), golden_copy("slim-full-vocab", tmp_path)
    done = run("convert", "--ptuning", tuned, "--base", other, "--out", tmp_path / "p2")
    if done.returncode == 0:  # the same layers and width: the prefix does not depend on the vocabulary
        assert "slim era" in done.stdout
    else:
        assert done.returncode == 1
        assert "cure:" in done.stderr and "Traceback" not in done.stderr


def test_prefix_over_a_pre_slim_base_tells_the_era_or_refuses(tmp_path: Path) -> None:
    tuned, base = checkpoint_of_2023(tmp_path), golden_copy("preslim-full-vocab", tmp_path)
    done = run("convert", "--ptuning", tuned, "--base", base, "--out", tmp_path / "p2")
    assert done.returncode in (0, 1)
    assert "pre-slim era" in done.stdout or "cure:" in done.stderr
    shutil.rmtree(tmp_path / "p2", ignore_errors=True)
