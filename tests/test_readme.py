"""The READMEs are true: the tree, the commands, the Python blocks, the printed answers, and the two languages alike."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from chatglm.chat import EMBEDDED_MODEL
from chatglm.cli.question_reader import PROMPT

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README_zh.md")
TWO_LEVELS_OF = (
    "src/chatglm",
    "docs",
    "examples",
    "scripts",
    "tests",
)  # folders whose entries the tree names one by one

pytestmark = pytest.mark.skipif(not (ROOT / "README_zh.md").is_file(), reason="the READMEs are not beside the tests")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[list[str]]:
    """Every command of the bash blocks, as words; comments and `&&` taken apart."""
    lines = "".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    single = [part for line in lines for part in re.split(r"&&|;|\|", line.split(" #")[0]) if part.strip()]
    return [shlex.split(part) for part in single]


def tracked_files() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("this is not a git checkout")
    return done.stdout.splitlines()


def tree_entries(name: str) -> set[str]:
    """Paths of the annotated tree: two spaces of indent a level, names that share a line, `#` before the note."""
    (tree,) = [block for block in blocks(name, "text") if block.startswith("chatglm/\n")]
    parents: list[str] = []
    entries = set()
    for line in tree.splitlines()[1:]:
        names = line.split("#")[0].rstrip()
        depth = (len(names) - len(names.lstrip())) // 2 - 1
        for entry in names.split():
            path = "/".join([*parents[:depth], entry.rstrip("/")])
            entries.add(path)
            parents = [*parents[:depth], entry.rstrip("/")]
    return entries


def expected_entries() -> set[str]:
    entries = set()
    for file in tracked_files():
        parts = file.split("/")
        entries.add(parts[0])
        for folder in TWO_LEVELS_OF:
            is_inside = file.startswith(f"{folder}/")
            if is_inside and (folder != "tests" or len(parts) > 2):  # of tests/, the folders
                depth = folder.count("/") + 2
                entries |= {"/".join(parts[:level]) for level in range(1, depth + 1)}
    return {entry for entry in entries if not entry.endswith(("__init__.py", "py.typed", ".gitignore"))}


@pytest.mark.parametrize("name", READMES)
def test_the_annotated_tree_is_true_both_ways(name: str) -> None:
    assert tree_entries(name) == expected_entries()


@pytest.mark.parametrize("name", READMES)
def test_every_command_exists_with_its_options(name: str) -> None:
    found = commands(name)
    assert ["make", "chat"] in found
    assert ["make", "test"] in found
    for words in found:
        if words[0] == "chatglm":
            check_chatglm_command(words[1:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:.*##", text_of("Makefile"), re.MULTILINE), words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[0] in ("git", "cd", "pip", "sudo"), words


def check_chatglm_command(words: list[str]) -> None:
    """The words parse: the command exists, takes these options with values of the right kind, and so many arguments."""
    import typer

    from chatglm.cli import app

    group = typer.main.get_command(app)
    context = group.make_context("chatglm", [], resilient_parsing=True)
    command = group.get_command(context, words[0])
    assert command is not None, words
    command.make_context(words[0], words[1:])  # raises a usage error for what does not parse


def test_a_wrong_option_in_a_readme_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        check_chatglm_command(["chat", "--no-such-option"])


def test_the_python_blocks_run_on_the_embedded_model() -> None:
    """Where a block names the full-size model on a GPU, the embedded one on the CPU stands in. One language: the blocks
    are the same in both."""
    found = blocks("README.md", "python")
    assert len(found) >= 2
    for block in found:
        code = block.replace('"THUDM/chatglm-6b"', repr(str(EMBEDDED_MODEL))).replace(".half().cuda()", ".float()")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "ChatGLM" in done.stdout
        assert not re.search("warning|error|traceback", done.stderr, re.IGNORECASE), done.stderr  # a bar may be


def test_both_languages_have_the_same_structure() -> None:
    english, chinese = (text_of(name) for name in READMES)
    levels = [
        re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M) for text in (english, chinese)
    ]
    assert levels[0] == levels[1]
    assert [words for words in commands("README.md")] == [words for words in commands("README_zh.md")]
    bare = [[re.sub(r" *#.*", "", block) for block in blocks(name, "python")] for name in READMES]
    assert bare[0] == bare[1]
    assert tree_entries("README.md") == tree_entries("README_zh.md")


@pytest.mark.parametrize("name", READMES)
def test_links_lead_to_files_that_exist(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", text_of(name)):
        if "://" not in target:
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize(("name", "locale"), [("README.md", "en_US.UTF-8"), ("README_zh.md", "zh_CN.UTF-8")])
def test_the_transcript_is_what_the_chat_prints(name: str, locale: str) -> None:
    """Typed lines are piped in; greeting and answers must be those of the block. The editor's hint is not piped."""
    (transcript,) = [block for block in blocks(name, "text") if block.startswith("$ make chat")]
    typed = re.findall(rf"^{PROMPT}(.*)$", transcript, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "chatglm.cli", "chat", "--seed", "0"],
        input="\n".join(typed),
        env={**os.environ, "LC_ALL": locale, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    printed = (done.stderr + done.stdout).splitlines()
    shown = [line for line in transcript.splitlines()[1:] if line and not line.startswith((PROMPT, "Enter "))]
    assert sorted(shown) == sorted(printed)


def test_the_ten_first_answers_are_those_of_the_embedded_model() -> None:
    spec = importlib.util.spec_from_file_location("first_questions", ROOT / "examples" / "first_questions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    printed = module.as_markdown(module.first_answers())
    for name in READMES:
        assert printed in text_of(name)
