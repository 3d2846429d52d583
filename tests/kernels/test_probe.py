"""The choice of kernels: probed, said once, overridable."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

from chatglm.errors import DeviceError
from chatglm.kernels import probe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which everything that Triton needs is there."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "triton" else found(name))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(probe, "_why_not_build", lambda: None)


def test_plain_pytorch_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.choose_kernels("torch", CPU) == "torch"
    monkeypatch.setenv("CHATGLM_KERNELS", "torch")
    assert probe.choose_kernels(None, CPU) == "torch"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DeviceError, match="unknown kernels 'cutlass'; known: auto, triton, native, torch"):
        probe.choose_kernels("cutlass", CPU)


def test_triton_by_name_on_a_cpu_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match="the triton kernels were asked for, but the device is cpu, not cuda"):
        probe.choose_kernels("triton", CPU)


@pytest.mark.usefixtures("hopper")
def test_auto_takes_triton_where_nothing_is_missing() -> None:
    assert probe.why_not_triton(CUDA) is None
    assert probe.choose_kernels("auto", CUDA) == "triton"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("get_device_capability", lambda _=None: (7, 0)), "compute capability 7.0, they need 7.5"),
        (("_why_not_build", lambda: "no C compiler is found"), "no C compiler is found"),
    ],
)
def test_auto_falls_back_to_plain_pytorch_and_says_why_once(change, reason, monkeypatch, caplog) -> None:
    name, value = change
    monkeypatch.setattr(torch.cuda if hasattr(torch.cuda, name) else probe, name, value)
    probe._say.cache_clear()
    with caplog.at_level(logging.INFO, logger=probe.logger.name):
        assert [probe.choose_kernels("auto", CUDA) for _ in "ab"] == ["torch", "torch"]
    assert len(caplog.records) == 1 and reason in caplog.text


def test_a_missing_compiler_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(probe.shutil, "which", lambda _: None)
    assert "set CC, or install gcc" in (probe._why_not_build.__wrapped__() or "")


def test_overlap_needs_a_hopper_device() -> None:
    assert not probe.can_overlap(CPU)
