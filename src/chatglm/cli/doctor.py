"""`chatglm doctor`: what is here, what would be chosen and why, what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from ..errors import ChatGLMError
from .options import CommonOptions
from .units import human_bytes

OPTIONAL_PARTS = {
    "prompt_toolkit": ("chat", "multi-line editing in `chatglm chat`"),
    "transformers": ("hf", "the model card's lines, AutoModel and Trainer"),
    "accelerate": ("hf", "transformers' device_map and Trainer"),
    "peft": ("hf", "LoRA adapters"),
    "llvmlite": ("cpu", "fast CPU kernels, compiled here without a compiler"),
    "fastapi": ("serve", "`chatglm serve`"),
    "uvicorn": ("serve", "`chatglm serve`"),
    "prometheus_client": ("serve", "metrics of `chatglm serve`"),
    "llguidance": ("serve", "answers in a given JSON schema"),
}
"""Package → our extra, and what it is good for."""


def doctor(*, common: CommonOptions) -> None:
    """Print what this machine has, which device and dtype would be chosen and why, and what is missing.

    Always exit code 0.

    Try next: chatglm chat
    """
    facts = gather()
    if common.json:
        print(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    for heading, values in facts.items():
        print(heading)
        for name, value in values.items():
            print(f"  {name:<18} {value}")
    common.terminal().note("Try: chatglm chat")


def gather() -> dict[str, dict[str, Any]]:
    """Sections of facts, each name → text or number."""
    return {
        "software": _software(),
        "devices": _devices(),
        "choice": _choice(),
        "memory and disk": _space(),
        "optional parts": _optional_parts(),
        "settings": _settings(),
    }


def _software() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "chatglm": importlib.import_module("chatglm").__version__,
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
    }
    for package in ("torch", "numpy", "sentencepiece", "safetensors", "huggingface_hub"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = f"MISSING: pip install {package}"
    return facts


def _devices() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"PyTorch": f"does not start: {error}"}
    from ..engine.placement import physical_cores

    facts: dict[str, Any] = {"CPU": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"}
    facts["cores"] = f"{physical_cores()} physical of {os.cpu_count()} logical"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        facts[f"cuda:{index}"] = (
            f"{card.name}, compute capability {card.major}.{card.minor}, "
            f"{human_bytes(free)} free of {human_bytes(total)}"
        )
    if not torch.cuda.is_available():
        build = torch.version.cuda
        facts["CUDA"] = f"none found by this CUDA {build} build of PyTorch" if build else "none: PyTorch without CUDA"
    facts["MPS"] = "available" if torch.backends.mps.is_available() else "none"
    return facts


def _choice() -> dict[str, Any]:
    try:
        from ..chat import EMBEDDED_MODEL
        from ..config import ModelConfig, read_config
        from ..engine.loading import place
        from ..engine.placement import physical_cores
    except (ImportError, OSError) as error:
        return {"none": f"PyTorch does not start: {error}"}
    facts: dict[str, Any] = {}
    models = {"ChatGLM-6B": ModelConfig()}
    if (EMBEDDED_MODEL / "config.json").is_file():
        models["embedded model"] = read_config(EMBEDDED_MODEL / "config.json")
    for name, config in models.items():
        placement = place(config, "auto", "auto")
        dtype = str(placement.dtype).removeprefix("torch.")
        facts[name] = f"{dtype} on {placement.device}: {placement.reason}"
    facts["threads"] = f"{physical_cores()} (all physical cores; --threads N changes it)"
    facts["kernels"] = _kernels()
    return facts


def _kernels() -> str:
    """Which kernels would run on the device that is chosen, and why no faster ones."""
    from ..engine.placement import choose_device
    from ..kernels.probe import choose_kernels, why_not_native, why_not_triton

    device = choose_device()
    try:
        chosen = choose_kernels(None, device)
    except ChatGLMError as error:
        return error.message
    if chosen != "torch":
        return f"{chosen} on {device} (CHATGLM_KERNELS=torch takes plain PyTorch)"
    obstacle = why_not_native(device) if device.type == "cpu" else why_not_triton(device)
    return f"plain PyTorch on {device}: {obstacle or 'CHATGLM_KERNELS says so'}"


def _space() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    try:
        from ..engine.placement import free_memory

        free = free_memory("cpu")
        facts["free memory"] = "unknown" if free is None else human_bytes(free)
    except (ImportError, OSError):
        facts["free memory"] = "unknown"
    for name, folder in (("this folder", Path.cwd()), ("hub cache", hub_cache())):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        facts[f"disk, {name}"] = f"{human_bytes(shutil.disk_usage(existing).free)} free in {folder}"
    return facts


def hub_cache() -> Path:
    """Where pulled checkpoints lie, by huggingface_hub's own rules."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _optional_parts() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for package, (extra, purpose) in OPTIONAL_PARTS.items():
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = f'missing ({purpose}): pip install "chatglm[{extra}]"'
    return facts


def _settings() -> dict[str, Any]:
    names = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "NO_COLOR", "LC_ALL", "LANG")
    facts: dict[str, Any] = {name: os.environ[name] for name in names if os.environ.get(name)}
    secret = ("HTTPS_PROXY", "https_proxy", "HF_TOKEN")
    facts |= {name: "set" for name in secret if os.environ.get(name)}
    if sys.stdin and sys.stdout:
        facts["text encoding"] = f"in {sys.stdin.encoding}, out {sys.stdout.encoding}"
    return facts


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
