"""The program as a whole: help without weight, exit codes, suggestions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chatglm.cli.app import COMMANDS
from command_line import PROGRAM, environment, run

LIST_MODULES = (
    sys.executable,
    "-c",
    "import sys; from chatglm.cli import main\ntry: main()\nfinally: print(*sys.modules, sep='\\n', file=sys.stderr)",
)

HEAVY = {"torch", "transformers", "numpy", "sentencepiece", "safetensors", "huggingface_hub", "prompt_toolkit"}


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    done = run(*words, program=LIST_MODULES)
    modules = set(done.stderr.split())
    assert done.returncode == 0
    assert "Usage: chatglm" in done.stdout
    assert not modules & (HEAVY | {"rich.markdown", "rich.console", "asyncio"})


def test_help_imports_no_command_module() -> None:
    modules = set(run("--help", program=LIST_MODULES).stderr.split())
    assert not modules & {f"chatglm.cli.{command}" for command in COMMANDS}


def test_each_command_help_imports_only_its_own_module() -> None:
    modules = set(run("info", "--help", program=LIST_MODULES).stderr.split())
    assert "chatglm.cli.info" in modules
    assert not modules & {f"chatglm.cli.{command}" for command in COMMANDS if command != "info"}


def test_help_names_every_command_with_its_line() -> None:
    shown = " ".join(run("--help").stdout.split())
    for command, line in COMMANDS.items():
        assert f"{command} {line}" in shown


def test_no_command_shows_the_help() -> None:
    done = run()
    assert done.returncode == 0
    assert "Commands:" in done.stdout


def test_version_is_printed() -> None:
    import chatglm

    assert run("--version").stdout == f"chatglm {chatglm.__version__}\n"


def test_mistyped_command_is_refused_with_the_nearest_one() -> None:
    done = run("caht")
    assert done.returncode == 2
    assert "No such command 'caht'. Did you mean 'chat'?" in done.stderr
    assert done.stdout == ""


def test_unknown_command_lists_what_there_is() -> None:
    done = run("xyzzy")
    assert done.returncode == 2
    assert "Known: chat, generate" in done.stderr


def test_mistyped_option_is_refused_with_the_nearest_one() -> None:
    done = run("chat", "--temprature", "0")
    assert done.returncode == 2
    assert "--temperature" in done.stderr


def test_setting_out_of_range_is_wrong_usage_with_its_range() -> None:
    done = run("chat", "--temperature", "-1")
    assert done.returncode == 2
    assert "temperature is -1.0; it must be a number from 0 to 100" in done.stderr


def test_unknown_dtype_is_wrong_usage_with_the_known_ones() -> None:
    done = run("chat", "--dtype", "fp17")
    assert done.returncode == 2
    assert "fp17" in done.stderr
    assert "auto, fp32, fp16, bf16, int8, int4" in done.stderr


FAILING = """
import chatglm.cli.doctor
from chatglm.cli import main
def fail():
    {}
    return {{}}
chatglm.cli.doctor.gather = fail
main()
"""


def test_error_of_ours_is_its_message_without_traceback_and_exit_code_1() -> None:
    code = FAILING.format("from chatglm.errors import DeviceError; raise DeviceError('no such card', cure='buy one')")
    done = run("doctor", program=(sys.executable, "-c", code))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "chatglm: no such card\n  cure: buy one\n"


def test_unforeseen_error_is_one_line_and_a_cure() -> None:
    done = run("doctor", program=(sys.executable, "-c", FAILING.format("1 / 0")))
    assert done.returncode == 1
    assert done.stderr.startswith("chatglm: unexpected ZeroDivisionError: division by zero\n")
    assert "--debug" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = run("doctor", "--debug", program=(sys.executable, "-c", FAILING.format("1 / 0")))
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_interrupt_is_exit_code_130() -> None:
    done = run("doctor", program=(sys.executable, "-c", FAILING.format("raise KeyboardInterrupt")))
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_own_warnings_are_one_line_and_foreign_ones_are_hidden(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_sise": 1}')
    code = (
        f"import warnings, chatglm.config as c; c.read_config({str(tmp_path / 'config.json')!r}); "
        "warnings.warn_explicit('noise', UserWarning, 'x.py', 1, module='torch.x')"
    )
    done = run("doctor", "--quiet", program=(sys.executable, "-c", FAILING.format(code)))
    assert done.stderr.startswith("chatglm: warning: ")
    assert "unknown key `hidden_sise`" in done.stderr
    assert "noise" not in done.stderr


def test_closed_pipe_ends_quietly() -> None:
    line = f"{' '.join(PROGRAM)} doctor --json | head -c 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=environment(), check=False, timeout=60)
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr
