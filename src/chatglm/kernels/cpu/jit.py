"""Kernels from Python to machine code in this process, kept on disk for the next one.

The name of a kept file is a hash of the kernel's parameters, of the source of this folder, of the processor and of the
compiler, so a stale file is never read, and a kernel that is kept needs no intermediate code to be written again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
from llvmlite import binding

from .emitter import Module
from .target import Target, runnable

log = logging.getLogger(__name__)

VARIABLE = "CHATGLM_KERNEL_CACHE"
"""Environment variable: where machine code is kept, instead of the user's cache folder."""

_lock = threading.Lock()


def host_targets() -> list[Target]:
    """The targets that this machine can run, best first."""
    _initialize()
    machine = platform.machine().lower()
    features = {name: bool(has) for name, has in binding.get_host_cpu_features().items()}
    if machine in ("arm64", "aarch64"):
        features.setdefault("neon", True)
    return runnable(features, is_x86=machine in ("x86_64", "amd64", "i686"))


class Compiler:
    """Makes kernels for one target; their machine code lives as long as this object."""

    def __init__(self, target: Target) -> None:
        _initialize()
        self.target = target
        self._cpu = target.cpu or binding.get_host_cpu_name()
        self._features = target.features or binding.get_host_cpu_features().flatten()
        self._machine = binding.Target.from_default_triple().create_target_machine(
            cpu=self._cpu, features=self._features, opt=3, reloc="pic", codemodel="small", jit=True
        )
        self._engine = binding.create_lljit_compiler(self._machine)
        self._trackers: list[Any] = []

    def compile(self, description: str, names: tuple[str, ...], write: Callable[[Module], None]) -> dict[str, int]:
        """Addresses of the functions `names`, which `write` puts into a module. `description` tells all parameters."""
        known = f"{llvmlite.__version__} {self._cpu} {self._features} {self.target} {_source_hash()} {description}"
        key = hashlib.sha256(known.encode()).hexdigest()[:40]
        path = cache_folder() / f"{key}.o"
        image = _read(path)
        if image is None:
            image = self._image(write)
            _keep(path, image)
        builder = binding.JITLibraryBuilder().add_object_img(image).add_current_process()
        for name in names:
            builder.export_symbol(name)
        with _lock:
            tracker = builder.link(self._engine, f"{len(self._trackers)} {key}")
            self._trackers.append(tracker)
            return {name: tracker[name] for name in names}

    def assembly(self, write: Callable[[Module], None]) -> str:
        """The optimised assembly of a module, to read."""
        text: str = self._machine.emit_assembly(self._optimise(write))
        return text

    def _image(self, write: Callable[[Module], None]) -> bytes:
        image: bytes = self._machine.emit_object(self._optimise(write))
        return image

    def _optimise(self, write: Callable[[Module], None]) -> Any:
        module = Module()
        write(module)
        parsed = binding.parse_assembly(str(module.raw))
        parsed.verify()
        tuning = binding.create_pipeline_tuning_options(speed_level=2)
        tuning.loop_unrolling = False  # kernels unroll themselves
        tuning.slp_vectorization = False
        tuning.loop_vectorization = False
        builder = binding.create_pass_builder(self._machine, tuning)
        builder.getModulePassManager().run(parsed, builder)
        return parsed


def cache_folder() -> Path:
    """Where machine code is kept: CHATGLM_KERNEL_CACHE, or below the user's cache folder."""
    asked = os.environ.get(VARIABLE)
    if asked:
        return Path(asked)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "chatglm" / "kernels"


@functools.cache
def _initialize() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


@functools.cache
def _source_hash() -> str:
    """Of every file here: whoever edits a kernel gets new machine code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _keep(path: Path, image: bytes) -> None:
    """Write beside and rename; a machine without a writable folder compiles every time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    except OSError as error:
        log.debug("machine code is not kept: %s", error)
        return
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(image)
        os.replace(temporary, path)
    except OSError as error:
        log.debug("machine code is not kept: %s", error)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
