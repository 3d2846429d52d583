"""Which device and dtype: `auto` picks a pair that works here, and says why."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import DeviceError
from ..kernels.probe import why_not_native

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHT_FORMATS = ("int8", "int4")

SMALL_MODEL_BYTES = 1 << 30
"""Below this (in fp32) a quantised checkpoint is expanded: exact, and the memory does not matter."""

_ALIASES = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Placement:
    """A device, the dtype of activations, and the reason in a few words."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def normalize_dtype(name: str) -> str:
    """`auto`, `fp32`, `fp16`, `bf16`, `int8` or `int4`. Raises DeviceError for another name."""
    name = _ALIASES.get(name, name)
    if name not in ("auto", *DTYPES, *WEIGHT_FORMATS):
        raise DeviceError(f"unknown dtype {name!r}; known: auto, {', '.join(DTYPES)}, {', '.join(WEIGHT_FORMATS)}")
    return name


def choose_device(name: str = "auto") -> torch.device:
    """The named device, or the best one here (CUDA, then Apple's MPS, then CPU). Raises DeviceError if it is not
    there.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:N, mps") from error
    found = {"cuda": has_cuda, "mps": has_mps, "cpu": True}.get(device.type, False)
    if not found:
        raise DeviceError(
            f"device {name!r} was asked for, but PyTorch {torch.__version__} finds no {device.type} device here"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {name!r} was asked for; this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def check_devices(name: str, count: int) -> None:
    """Raises DeviceError when `count` devices are not here. Processes on a CPU count only when the CPU is named."""
    found = torch.cuda.device_count() if choose_device(name).type == "cuda" else 1
    if count > found and name != "cpu":
        raise DeviceError(f"{count} devices asked, {found} found")


def check_room(device: torch.device, needs: Mapping[str, int], form: str) -> None:
    """Raises DeviceError when the model does not fit into what is free.

    needs  bytes by form of the weights (fp32, fp16, bf16, int8, int4), one conversation's cache included
    form   the one that was chosen
    """
    free = free_memory(device)
    if free is None or needs[form] <= free:
        return
    fitting = [name for name in needs if needs[name] <= free]
    best = max(fitting, key=lambda name: needs[name], default=None)
    raise DeviceError(
        f"{form} needs {needs[form] / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {device}",
        cure=f'load with dtype="{best}" ({needs[best] / 1e9:.1f} GB)' if best else "no form of this model fits here",
    )


def choose_placement(device_name: str, dtype_name: str, fp32_bytes: int, *, is_fp16_exact: bool = True) -> Placement:
    """Device, and dtype of the weights that are not quantised.

    fp32_bytes     what the model needs in fp32: on a CPU without native kernels a small one runs faster in it
    is_fp16_exact  whether the stored weights are fp16 numbers; others stay fp32 on a CPU
    """
    device, dtype_name = choose_device(device_name), normalize_dtype(dtype_name)
    if dtype_name in DTYPES:
        return Placement(device, DTYPES[dtype_name], "as asked")
    if device.type == "cuda":
        return Placement(device, torch.float16, "fp16 is what the weights were released in")
    if device.type == "mps":
        return Placement(device, torch.float16, "fp16 is native on MPS")
    if not is_fp16_exact:
        return Placement(device, torch.float32, "rounding these weights to fp16 would change them")
    if why_not_native(device) is not None and fp32_bytes < SMALL_MODEL_BYTES:
        return Placement(device, torch.float32, "small models run fastest so without native kernels")
    return Placement(device, torch.float16, "the weights were released so; a CPU computes with them in fp32")


def free_memory(device: torch.device | str = "cpu") -> int | None:
    """Free bytes on the device, or None where the system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once where the system tells."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    siblings: set[str] = set()
    try:
        for cpu in os.sched_getaffinity(0):
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as text:
                siblings.add(text.read())
    except (OSError, AttributeError):
        return allowed
    return len(siblings) or allowed
