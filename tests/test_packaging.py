"""What is in the wheel, what it asks for, and that a wheel on its own can talk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MINI = resources.files("chatglm") / "assets" / "mini"
MINI_FILES = {"README.md", "config.json", "ice_text.model", "model.safetensors", "tokenizer_config.json"}
NEVER_REQUIRED = [
    "nvidia-*",
    "cuda-*",
    "triton",
    "flash-attn",
    "flashinfer",
    "bitsandbytes",
    "torchao",
    "onnxruntime",
    "transformers",
    "gradio",
    "fastapi",
    "ray",
    "trl",
    "datasets",
    "pandas",
    "wandb",
    "lm-eval",
    "icetk",
    "cpm-kernels",
    "protobuf",
]


def requirement_names(*, extras: bool) -> set[str]:
    lines = importlib.metadata.requires("chatglm") or []
    return {re.split(r"[ <>=!~;\[(]", line)[0].lower() for line in lines if extras or "extra ==" not in line}


def test_the_embedded_model_is_in_the_package_and_small() -> None:
    files = {file.name: file.read_bytes() for file in MINI.iterdir() if file.is_file()}
    assert set(files) == MINI_FILES
    assert sum(map(len, files.values())) <= 56_000_000


def test_the_model_card_states_tokenizer_hash_and_licence() -> None:
    card = (MINI / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((MINI / "ice_text.model").read_bytes()).hexdigest() in card
    assert "research and demonstration only" in card
    assert "仅供研究与演示使用" in card


def test_the_rows_of_the_card_add_up() -> None:
    card = (MINI / "README.md").read_text(encoding="utf-8")
    groups = [int(number.replace(",", "")) for number in re.findall(r"^\| \*\*.*?\*\* \| \*\*([\d,]+)\*\*", card, re.M)]
    stated = re.search(r"one of our own, ([\d,]+) rows", card)
    assert len(groups) == 5
    assert stated is not None and sum(groups) == int(stated.group(1).replace(",", ""))


def test_nothing_heavy_is_a_hard_dependency() -> None:
    required = requirement_names(extras=False)
    for name in NEVER_REQUIRED:
        pattern = re.compile(name.replace("*", ".*"))
        assert not [found for found in required if pattern.fullmatch(found)]


def test_constraints_are_exact_public_versions_and_cover_every_requirement() -> None:
    if not (ROOT / "constraints.txt").is_file():
        pytest.skip("constraints.txt is not beside the tests")
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = set()
    for line in lines:
        found = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)( ; .+)?", line)
        assert found is not None, line  # no `+cpu`, no ranges, no addresses
        pinned.add(found.group(1))
    assert "torch" in pinned
    assert {name.replace("_", "-") for name in requirement_names(extras=True)} <= pinned


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("pyproject.toml is not beside the tests")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_the_model_and_the_licence_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"chatglm/assets/mini/{name}" for name in MINI_FILES} <= set(names)
    assert "chatglm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"chatglm"}


def test_a_wheel_alone_answers_with_the_embedded_model(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import chatglm, json; reply = chatglm.load(device='cpu').chat('你好', temperature=0); "
        "print(json.dumps([chatglm.__file__, reply.text]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    place, answer = json.loads(done.stdout.splitlines()[-1])
    assert Path(place).is_relative_to(tmp_path)
    assert "ChatGLM" in answer
