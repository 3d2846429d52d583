"""`--adapter` of chat, generate and convert."""

from __future__ import annotations

from pathlib import Path

import chatglm
from adapter_folders import low_rank_folder
from chatglm.config import read_config
from command_line import run

MINI = Path(chatglm.__file__).parent / "assets" / "mini"
SHORT = ("--max-new-tokens", "8", "--temperature", "0", "--threads", "1", "--quiet")


def test_chat_generate_and_a_merged_checkpoint_answer_alike_and_unlike_the_base(tmp_path: Path) -> None:
    adapter = low_rank_folder(tmp_path / "adapter", read_config(MINI / "config.json"), seed=2, size=0.3)
    question = "What is the capital of France?\n"
    by_chat = run("chat", "--adapter", adapter, *SHORT, stdin=question)
    assert by_chat.returncode == 0, by_chat.stderr
    by_folder = run("chat", adapter, *SHORT, stdin=question)
    assert by_folder.stdout == by_chat.stdout
    by_generate = run("generate", MINI, "--adapter", adapter, *SHORT, stdin=question)
    assert by_generate.returncode == 0, by_generate.stderr
    merged = run("convert", "--adapter", adapter, "--base", MINI, "--out", tmp_path / "merged", "--dtype", "fp32")
    assert merged.returncode == 0, merged.stderr
    by_merged = run("generate", tmp_path / "merged", *SHORT, stdin=question)
    plain = run("generate", *SHORT, stdin=question)
    assert by_chat.stdout.strip() == by_generate.stdout.strip() == by_merged.stdout.strip() != plain.stdout.strip()


def test_an_adapter_whose_base_is_not_here_is_one_error_with_both_commands(tmp_path: Path) -> None:
    adapter = low_rank_folder(tmp_path / "adapter", read_config(MINI / "config.json"), base="somebody/nowhere")
    done = run("chat", "--adapter", adapter)
    assert done.returncode == 1
    assert "its base somebody/nowhere is not here" in done.stderr
    assert f"chatglm chat MODEL --adapter {adapter}" in done.stderr and "convert --adapter" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_of_an_adapter_alone_is_told_the_command(tmp_path: Path) -> None:
    adapter = low_rank_folder(tmp_path / "adapter", read_config(MINI / "config.json"))
    done = run("serve", adapter, "--port", "0")
    assert done.returncode == 1
    assert f"chatglm serve MODEL --adapter NAME={adapter}" in done.stderr


def test_convert_wants_adapter_and_base_together(tmp_path: Path) -> None:
    for words in (("--adapter", tmp_path), (MINI, "--base", MINI), (MINI, "--adapter", tmp_path, "--base", MINI)):
        done = run("convert", *words, "--out", tmp_path / "out")
        assert done.returncode == 2, words
    assert not (tmp_path / "out").exists()
