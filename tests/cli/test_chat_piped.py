"""`chatglm chat` as part of a pipe."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import PROGRAM, environment, run

SHORT = ("--temperature", "0", "--max-new-tokens", "12", "--threads", "2")


def test_answers_are_on_stdout_and_all_else_on_stderr() -> None:
    done = run("chat", *SHORT, stdin="你好\n/set seed 3\nHello!\n")
    assert done.returncode == 0
    answers = done.stdout.splitlines()
    assert len(answers) == 2
    assert all(answers)
    assert "ChatGLM mini: the embedded demo, 44 million" in done.stderr
    assert "ChatGLM mini：随包附带的演示模型" in done.stderr
    assert "seed = 3" in done.stderr
    for unwanted in ("\x1b", "You>", "%", "loading"):
        assert unwanted not in done.stdout + done.stderr


def test_quiet_leaves_nothing_but_answers() -> None:
    done = run("chat", "--quiet", *SHORT, stdin="你好\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


def test_chinese_locale_puts_chinese_first() -> None:
    done = run("chat", stdin="", LC_ALL="zh_CN.UTF-8")
    assert done.returncode == 0
    assert done.stderr.index("随包附带") < done.stderr.index("embedded")


def test_json_has_one_object_a_line_with_the_facts_of_the_answer() -> None:
    done = run("chat", "--json", "--seed", "5", *SHORT, stdin="你好\n1+1?\n")
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["prompt"], first["seed"], second["prompt"]) == ("你好", 5, "1+1?")
    assert second["usage"]["context_tokens"] > first["usage"]["context_tokens"] > 0


def test_malformed_utf8_is_replaced_and_answered() -> None:
    done = run("chat", *SHORT, stdin=b"\xe4\xbd\xa0\xe5\xa5\xff\n")
    assert done.returncode == 0
    assert done.stdout.strip()


def test_question_that_is_too_long_is_an_error_on_stderr_and_exit_code_1() -> None:
    done = run("chat", *SHORT, stdin="很" * 2000 + "\n你好\n")
    assert done.returncode == 1
    assert "are reserved for the answer" in done.stderr
    assert done.stdout.count("\n") == 1


def test_interrupt_ends_a_piped_chat_with_130() -> None:
    words = [*PROGRAM, "chat", "--threads", "2"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("/set min_new_tokens 250\n介绍一下北京\n".encode())
        process.stdin.flush()
        assert process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert b"Traceback" not in process.stderr.read()


def test_interrupt_while_loading_ends_with_130() -> None:
    words = [*PROGRAM, "chat", "--threads", "2"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stderr
        assert process.stderr.readline()  # the greeting comes before PyTorch
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("words", [["chat"], ["generate"]])
def test_a_local_model_opens_no_socket(words: list[str], tmp_path: Path) -> None:
    from chatglm.cli.source_folder import EMBEDDED_MODEL

    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from chatglm.cli import main\nmain()"
    )
    folder = tmp_path / "copy"
    folder.symlink_to(EMBEDDED_MODEL)
    done = run(*words, folder, *SHORT, stdin="你好\n", program=(sys.executable, "-c", code), HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_model_split_over_two_processes_answers_the_same() -> None:
    split = run("chat", "--dtype", "fp32", "--devices", "2", "--device", "cpu", *SHORT, stdin="你好\n")
    assert split.returncode == 0, split.stderr
    assert split.stdout == run("chat", "--dtype", "fp32", *SHORT, stdin="你好\n").stdout
    assert "ChatGLM mini" in split.stderr


def test_loading_imports_neither_torchs_compiler_nor_the_hub() -> None:
    code = (
        "import sys; from chatglm.cli import main\n"
        "try: main()\nfinally: print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    modules = set(run("chat", *SHORT, stdin="你好\n", program=(sys.executable, "-c", code)).stderr.split())
    assert "torch" in modules
    assert not modules & {"torch._dynamo", "sympy", "transformers", "huggingface_hub", "rich", "prompt_toolkit"}
