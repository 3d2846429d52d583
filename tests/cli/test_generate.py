"""`chatglm generate`: prompts in, answers out."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from chatglm import ChatModel
from chatglm.cli.generate import answer_batch
from chatglm.cli.prompt_files import Prompt
from command_line import PROGRAM, environment, run

SHORT = ("--temperature", "0", "--max-new-tokens", "12", "--threads", "2")


def test_answers_are_those_of_the_prompts_alone_in_order(model: ChatModel) -> None:
    prompts = ["你好", "What is the capital of Japan?", "讲个笑话"]
    settings = {"temperature": 0.0, "max_new_tokens": 12}
    records = answer_batch(model, [Prompt(text, {}) for text in prompts], None, settings)
    assert [record["answer"] for record in records] == [model.chat(text, **settings).text for text in prompts]
    assert [record["prompt"] for record in records] == prompts


def test_a_system_message_stands_before_every_prompt(model: ChatModel) -> None:
    settings = {"temperature": 0.0, "max_new_tokens": 12}
    (record,) = answer_batch(model, [Prompt("你好", {})], "你是一只猫", settings)
    assert record["answer"] == model.chat("你好", system="你是一只猫", **settings).text
    assert record["prompt"] == "你好"


def test_a_prompt_that_is_too_long_has_an_error_in_its_place_and_the_others_are_answered(model: ChatModel) -> None:
    batch = [Prompt("你好", {}), Prompt("很" * 2000, {"id": 4}), Prompt("hi", {})]
    first, second, third = answer_batch(model, batch, None, {"temperature": 0.0, "max_new_tokens": 4})
    assert first["answer"] and third["answer"]
    assert (second["answer"], second["id"]) == ("", 4)
    assert "reserved for the answer" in second["error"]


def test_file_to_file_and_the_next_command(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "你好"}\n"hi"\n', encoding="utf-8")
    out = tmp_path / "out.jsonl"
    done = run("generate", "-i", tmp_path / "in.jsonl", "-o", out, "--batch-size", "1", *SHORT)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"Saved 2 answers to {out}. Try: head {out}" in done.stderr
    first, second = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert (first["id"], first["prompt"], second["prompt"]) == (1, "你好", "hi")
    assert set(second) == {"prompt", "answer", "finish_reason", "usage", "seed"}
    again = run("generate", "-i", tmp_path / "in.jsonl", "-o", out, *SHORT)
    assert again.returncode == 1
    assert "exists already" in again.stderr


def test_through_a_pipe_each_line_has_its_answer_and_errors_make_exit_code_1() -> None:
    done = run("generate", *SHORT, stdin="你好\n" + "很" * 2000 + "\nhi\n")
    assert done.returncode == 1
    answers = done.stdout.split("\n")
    assert len(answers) == 4 and answers[0] and answers[1] == "" and answers[2]
    assert "1 prompt could not be answered" in done.stderr


def test_an_interrupted_run_is_taken_up_again(tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.txt", tmp_path / "out.txt"
    prompts.write_text("".join(f"介绍一下北京 {number}\n" for number in range(40)), encoding="utf-8")
    words = ["generate", "-i", str(prompts), "-o", str(out), "--batch-size", "1", *SHORT]
    part = tmp_path / "out.txt.part"
    with subprocess.Popen([*PROGRAM, *words], env=environment(), stderr=subprocess.PIPE) as process:
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 3):
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not out.exists()
    done = run(*words)
    assert done.returncode == 0
    assert "of 40 prompts are answered" in done.stderr
    assert out.read_text(encoding="utf-8").count("\n") == 40
    assert not part.exists()
