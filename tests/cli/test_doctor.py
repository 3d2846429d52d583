"""`chatglm doctor`: facts, choices, cures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from chatglm.cli.doctor import OPTIONAL_PARTS
from command_line import run

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_every_section_is_there_and_the_exit_code_is_0() -> None:
    done = run("doctor")
    assert done.returncode == 0
    for text in (
        "Python",
        "torch",
        "ChatGLM-6B",
        "embedded model",
        "free memory",
        "disk, hub cache",
        "threads",
        "kernels",
    ):
        assert text in done.stdout
    assert "Try: chatglm chat" in done.stderr


def test_json_has_the_same_sections() -> None:
    facts = json.loads(run("doctor", "--json").stdout)
    assert list(facts) == ["software", "devices", "choice", "memory and disk", "optional parts", "settings"]
    assert facts["choice"]["embedded model"].startswith("float32 on cpu: ")


def test_a_missing_part_is_named_with_its_purpose_and_command() -> None:
    code = (
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'prompt_toolkit': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from chatglm.cli import main\nmain()"
    )
    done = run("doctor", program=(sys.executable, "-c", code))
    assert done.returncode == 0
    assert 'missing (multi-line editing in `chatglm chat`): pip install "chatglm[chat]"' in done.stdout


def test_a_broken_pytorch_is_told_and_does_not_break_the_doctor() -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom chatglm.cli import main\nmain()"
    done = run("doctor", program=(sys.executable, "-c", code))
    assert done.returncode == 0
    assert "PyTorch            does not start" in done.stdout
    assert "Traceback" not in done.stderr


def test_kernels_are_told_with_the_reason() -> None:
    done = run("doctor", "--json", CHATGLM_KERNELS="torch")
    assert json.loads(done.stdout)["choice"]["kernels"].startswith("plain PyTorch on ")
    wrong = run("doctor", "--json", CHATGLM_KERNELS="magic")
    assert wrong.returncode == 0
    assert "unknown kernels 'magic'" in json.loads(wrong.stdout)["choice"]["kernels"]


def test_secrets_in_the_environment_are_not_printed() -> None:
    done = run("doctor", HTTPS_PROXY="http://me:hunter2@proxy", HF_TOKEN="hf_secret")
    assert "hunter2" not in done.stdout and "hf_secret" not in done.stdout
    assert "HTTPS_PROXY" in done.stdout


@pytest.mark.skipif(not PYPROJECT.is_file(), reason="pyproject.toml is not beside the tests")
def test_optional_parts_are_those_of_the_extras() -> None:
    extras = (
        PYPROJECT.read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2].partition("[project")[0]
    )
    for package, (extra, _) in OPTIONAL_PARTS.items():
        line = next(line for line in extras.splitlines() if line.startswith(f"{extra} = "))
        assert package.replace("_", "-") in line or package in line
