"""The house rules of docs/architecture.md: one-way imports, small files, a light `import chatglm`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chatglm

SOURCE = Path(chatglm.__file__).parent

ROOMS = (
    "errors",
    "config",
    "model",
    "tokenizer",
    "checkpoint",
    "quantization",
    "kernels",
    "parallel",
    "engine",
    "chat",
    "evaluation",
    "training",
    "hf",
    "server",
    "cli",
)
"""From the ground up: a room imports only from itself and from rooms to the left."""

ALLOWED_BY_LEAVES = {"errors": set(), "config": {"errors"}}
BASE_OF_TOKENIZER = {"torch", "transformers", "safetensors"}  # never: text work must not cost a tensor library
OPTIONAL = {"accelerate", "gradio", "fastapi", "peft", "prompt_toolkit", "ray", "transformers", "uvicorn"}


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(module: str) -> str | None:
    """`chatglm.model.glm` → `model`; a name exported by `chatglm` itself → the room it comes from."""
    parts = module.split(".")
    if parts[0] != "chatglm" or len(parts) == 1:
        return None
    return chatglm._HOMES.get(parts[1], parts[1])


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of all modules and names that are imported anywhere in the tree, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


def package_of(path: Path) -> str:
    return ".".join(("chatglm", *path.relative_to(SOURCE).parts[:-1]))


def rooms_imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {room for name in imports(tree, package_of(path)) if (room := room_of(name)) is not None}


def own_room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_only_from_rooms_below_it(path: Path) -> None:
    room = own_room(path)
    if path == SOURCE / "__init__.py":
        return  # it names the rooms, lazily
    assert room in (*ROOMS, "__main__"), f"{path.name} is in no room of docs/architecture.md"
    below = set(ROOMS) if room == "__main__" else set(ROOMS[: ROOMS.index(room) + 1])
    assert rooms_imported(path) - {"__version__"} <= below


@pytest.mark.parametrize("leaf", ALLOWED_BY_LEAVES)
def test_leaves_import_next_to_nothing_of_ours(leaf: str) -> None:
    assert rooms_imported(SOURCE / f"{leaf}.py") <= ALLOWED_BY_LEAVES[leaf]


def test_an_import_that_goes_up_is_found_inside_functions_and_behind_relative_names() -> None:
    code = "def f():\n    from ..engine import Runner\n    import chatglm.chat\n    from . import rotary\n"
    found = {room_of(name) for name in imports(ast.parse(code), "chatglm.model")}
    assert found == {"engine", "chat", "model"}


def test_the_tokenizer_needs_no_tensor_library() -> None:
    for path in (SOURCE / "tokenizer").rglob("*.py"):
        found = {
            name.split(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")), "chatglm.tokenizer")
        }
        assert not found & BASE_OF_TOKENIZER, path.name


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_extras_are_imported_where_they_are_used(path: Path) -> None:
    if own_room(path) in ("hf", "server"):
        return  # each of these is one extra as a whole
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not {name.split(".")[0] for name in imports(at_import, package_of(path))} & OPTIONAL


def test_no_module_is_named_after_nothing() -> None:
    nameless = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [path for path in SOURCE.rglob("*") if path.stem in nameless]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_is_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 500, f"{lines} lines: which second idea moved in?"


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, chatglm; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "chatglm" in loaded
    assert not {"torch", "transformers", "numpy", "sentencepiece", "rich", "typer"} & set(loaded)
