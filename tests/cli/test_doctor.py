"""`chatglm doctor`: facts, choices, cures."""

from __future__ import annotations

import json
import sys

from chatglm.cli.doctor import OPTIONAL_PARTS, gather
from command_line import run


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
    assert facts["choice"]["embedded model"].startswith("float16 on cpu: ")


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


def test_secrets_in_the_environment_are_not_printed() -> None:
    done = run("doctor", HTTPS_PROXY="http://me:hunter2@proxy", HF_TOKEN="hf_secret")
    assert "hunter2" not in done.stdout and "hf_secret" not in done.stdout
    assert "HTTPS_PROXY" in done.stdout


def test_extras_of_the_optional_parts_exist() -> None:
    import importlib.metadata

    extras = importlib.metadata.metadata("chatglm").get_all("Provides-Extra") or []
    assert {extra for extra, _ in OPTIONAL_PARTS.values()} <= set(extras)
    assert set(gather()["optional parts"]) == set(OPTIONAL_PARTS)
