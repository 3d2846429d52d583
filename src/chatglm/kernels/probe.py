"""Which kernels run: Triton's, native ones for the CPU, or plain PyTorch's. Asked once, said once, and overridable."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil

import torch

from ..errors import DeviceError

logger = logging.getLogger(__name__)

VARIABLE = "CHATGLM_KERNELS"
CHOICES = ("auto", "triton", "native", "torch")


def choose_kernels(asked: str | None, device: torch.device) -> str:
    """`triton`, `native` (kernels.cpu) or `torch` for this device; one log line says which and why.

    asked  auto, triton, native or torch; None asks the environment variable CHATGLM_KERNELS, then is auto
    Raises DeviceError for an unknown name, and where kernels are asked for by name and cannot run.
    """
    source = "asked for"
    if asked is None:
        asked, source = os.environ.get(VARIABLE, "auto"), f"{VARIABLE} says so"
    if asked not in CHOICES:
        raise DeviceError(f"unknown kernels {asked!r}; known: {', '.join(CHOICES)}")
    obstacles = {"triton": why_not_triton(device), "native": why_not_native(device)}
    if obstacle := obstacles.get(asked):
        raise DeviceError(f"the {asked} kernels were asked for, but {obstacle}", cure="use `auto` or `torch`")
    if asked != "auto":
        _say(asked, str(device), source)
        return asked
    chosen = next((name for name, obstacle in obstacles.items() if obstacle is None), "torch")
    reasons = {
        "triton": "a CUDA device, Triton and a C compiler are here",
        "native": "compiled here for this processor",
        "torch": obstacles["native" if device.type == "cpu" else "triton"],
    }
    _say(chosen, str(device), reasons[chosen] or "")
    return chosen


def why_not_native(device: torch.device) -> str | None:
    """What keeps the native kernels from running on this device, or None."""
    if device.type != "cpu":
        return f"the device is {device.type}, not cpu"
    return _why_not_compile()


@functools.cache
def _why_not_compile() -> str | None:
    if importlib.util.find_spec("llvmlite") is None:
        return 'the package llvmlite is not installed (pip install "chatglm[cpu]")'
    try:
        from .cpu.jit import host_targets

        targets = host_targets()
    except Exception as error:
        return f"llvmlite cannot be used ({error})"
    return None if targets else "this processor is too old for them (it has no F16C)"


def why_not_triton(device: torch.device) -> str | None:
    """What keeps the Triton kernels from running on this device, or None."""
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.hip is not None:
        return "they are tested on NVIDIA devices only"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (7, 5):
        return f"the device has compute capability {major}.{minor}, they need 7.5"
    return _why_not_build()


def _is_interpreted(device: torch.device) -> bool:
    """Triton's interpreter runs the kernels on a CPU: slow, for tests, so only when asked for by name."""
    is_on = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
    return device.type == "cpu" and is_on


@functools.cache
def _why_not_build() -> str | None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        return "no C compiler is found (Triton builds its launcher with one; set CC, or install gcc)"
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"triton cannot be imported ({error})"
    return None


@functools.cache
def _say(chosen: str, device: str, reason: str) -> None:
    logger.info("kernels on %s: %s (%s)", device, chosen, reason)


def can_overlap(device: torch.device) -> bool:
    """Whether kernels may start before the one before them ends (Hopper and newer, Triton 3.4 and newer)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    from .gpu import device_parts

    return bool(device_parts.CAN_OVERLAP)
