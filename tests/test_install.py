"""scripts/install.py chooses the build of torch: a table of machines, and the file it reads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
INDEX = "file:///an/index/of/cpu/wheels"
CPU, PLAIN = {"2.14.0", "2.13.0", "2.13.0+cpu"}, {"2.14.0", "2.13.0"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    if not (ROOT / "scripts" / "install.py").is_file():
        pytest.skip("scripts/ is not beside the tests")
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["install"] = module
    spec.loader.exec_module(module)
    return module


class Machine:
    """What scripts/install.py can learn about an environment, written down instead of asked."""

    folder = Path(".venv")

    def __init__(self, present=None, configured=PLAIN, at_index=CPU, gpu=False, linux=True) -> None:
        self.present, self.configured, self.at_index, self.gpu, self.linux = present, configured, at_index, gpu, linux

    def installed(self, package: str) -> str | None:
        return self.present

    def offered(self, *options: str) -> set[str]:
        return self.at_index if INDEX in options else self.configured

    def is_linux(self) -> bool:
        return self.linux

    def sees_gpu(self) -> bool:
        return self.gpu


FROM_INDEX = ["--index-url", INDEX, "--no-deps", "torch==2.13.0+cpu"]


@pytest.mark.parametrize(
    ("choice", "machine", "arguments"),
    [
        pytest.param("auto", Machine(present="2.13.0+cpu"), None, id="a-torch-that-fits-is-kept"),
        pytest.param("auto", Machine(present="2.13.0+cu126", gpu=True), None, id="whatever-its-build"),
        pytest.param("auto", Machine(configured=CPU, gpu=True), ["torch==2.13.0"], id="pip-offers-a-cpu-wheel"),
        pytest.param("auto", Machine(gpu=True), ["torch==2.13.0"], id="a-gpu-takes-the-plain-wheel"),
        pytest.param("auto", Machine(), FROM_INDEX, id="no-gpu-takes-the-cpu-index"),
        pytest.param("auto", Machine(at_index=set()), ["torch==2.13.0"], id="no-index-falls-back-to-the-plain-wheel"),
        pytest.param("auto", Machine(linux=False), ["torch==2.13.0"], id="elsewhere-than-linux-plain-is-cpu"),
        pytest.param("cuda", Machine(configured=CPU), ["torch===2.13.0"], id="cuda-passes-over-an-offered-cpu-wheel"),
        pytest.param("cpu", Machine(gpu=True), FROM_INDEX, id="cpu-in-spite-of-a-gpu"),
        pytest.param("skip", Machine(present="2.15.0"), None, id="skip-keeps-any-version"),
        pytest.param(
            "auto",
            Machine(present="2.9.0"),
            ["--index-url", INDEX, "--force-reinstall", "--no-deps", "torch==2.13.0+cpu"],
            id="another-version-is-replaced",
        ),
        pytest.param(
            "cuda",
            Machine(present="2.13.0+cpu"),
            ["--force-reinstall", "--no-deps", "torch===2.13.0"],
            id="cuda-replaces-a-cpu-build",
        ),
    ],
)
def test_the_build_of_torch(script: ModuleType, choice: str, machine: Machine, arguments: list[str] | None) -> None:
    assert script.plan_torch(choice, "2.13.0", INDEX, machine).arguments == arguments


def test_the_large_download_is_announced(script: ModuleType) -> None:
    assert "3 GB" in script.plan_torch("auto", "2.13.0", INDEX, Machine(at_index=set())).line
    assert "3 GB" in script.plan_torch("auto", "2.13.0", INDEX, Machine(gpu=True)).line


@pytest.mark.parametrize(
    ("choice", "machine", "words"),
    [
        pytest.param("cpu", Machine(at_index=set()), "TORCH_INDEX", id="cpu-without-an-index"),
        pytest.param("skip", Machine(), "no torch", id="skip-without-torch"),
    ],
)
def test_a_choice_that_cannot_be_had_is_one_line(script: ModuleType, choice: str, machine: Machine, words: str) -> None:
    with pytest.raises(script.SetUpError, match=words):
        script.plan_torch(choice, "2.13.0", INDEX, machine)


def test_pip_that_fails_offers_nothing(script: ModuleType, tmp_path: Path) -> None:
    assert script.Environment(tmp_path / "absent").offered() == set()
    assert script.Environment(tmp_path / "absent").installed("torch") is None


def test_the_wanted_torch_is_the_one_of_the_constraints_file(script: ModuleType) -> None:
    assert script.wanted_torch("numpy==2.4.6\ntorch==2.13.0\n") == "2.13.0"
    with pytest.raises(script.SetUpError):
        script.wanted_torch("torchvision==0.29.1\n")


def test_an_old_python_is_refused_in_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.sys, "version_info", (3, 8, 10, "final", 0))
    assert script.main() == 1
    assert "needs 3.10 or newer" in capsys.readouterr().err
