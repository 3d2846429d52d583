"""Checkpoints of a run: `OUT/step-000100`, written beside its place and renamed, so that it is whole or not there.

A folder holds the tensors in PyTorch's distributed form (each process writes its part, any number of processes reads
them), and `manifest.json`, written last: sha256 of every file, where the run stands, its settings, and versions. Random
state is not stored because there is none: every draw is a function of (seed, step) or (seed, row).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from ..checkpoint.atomic import write_whole
from ..checkpoint.saving import dump
from ..checkpoint.tensor_file import sizes_said
from ..errors import TrainingError
from .optimizer import trained
from .sharding import World
from .stability import Watch

MANIFEST = "manifest.json"
FORMAT = 1
_FOLDER = re.compile(r"step-(\d{6,})")

log = logging.getLogger(__name__)


@dataclass
class Place:
    """Where a run stands: everything but tensors.

    step      updates done (skipped ones counted)
    position  rows of the stream read
    tokens, loss_tokens  seen so far, without padding
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    watch: Watch = field(default_factory=Watch)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Place:
        return cls(**{**mapping, "watch": Watch.from_mapping(mapping["watch"])})


def folder_name(step: int) -> str:
    """Name of the checkpoint after `step` updates."""
    return f"step-{step:06d}"


def checkpoints(out: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first. Unfinished ones have other names."""
    found = [(int(match[1]), path) for path in out.glob("step-*") if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: parameters that learn, their optimiser state, and the model's buffers.

    Optimiser state is made where there is none yet, so that it can be read into.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained(model).items():
        tensors[f"model.{name}"] = parameter.detach()
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors


class Checkpoints:
    """The checkpoints of one run folder.

    keep        newest ones that stay; keep_every: every so many steps one stays for good
    background  files are written while training goes on
    """

    def __init__(
        self, out: Path, world: World, *, keep: int = 2, keep_every: int = 0, background: bool = False
    ) -> None:
        self.out, self.world = out, world
        self.keep, self.keep_every = keep, keep_every
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self.pending: Future[None] | None = None

    def save(
        self,
        place: Place,
        tensors: dict[str, Tensor],
        settings: Mapping[str, Any],
        more: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write a checkpoint (or begin to). A collective: every process calls it.

        more  writes further files into the folder, on process 0
        Raises TrainingError when the disk is full; the checkpoints before are untouched.
        """
        self.wait()
        target = self.out / folder_name(place.step)
        temporary = self.out / f".{target.name}.saving"
        facts = {"place": asdict(place), "settings": dict(settings), "world_size": self.world.size, **_versions()}
        self._begin(temporary, tensors)
        if more is not None and self.world.is_first:
            more(temporary)
        if self.writer is None:
            self._write(temporary, target, tensors, facts, None)
        else:
            copy = {name: _on_cpu(tensor) for name, tensor in tensors.items()}
            group = self.world.files
            self.pending = self.writer.submit(self._write, temporary, target, copy, facts, group)
        return target

    def wait(self) -> None:
        """Until the checkpoint in the background is on the disk; raises what went wrong there."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            if self.writer is not None:
                self.writer.shutdown()

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, and its manifest; damaged ones are passed over with a warning."""
        found = None
        if self.world.is_first:
            for path in reversed(checkpoints(self.out)):
                problem = damage(path)
                if problem is None:
                    found = path, json.loads((path / MANIFEST).read_text(encoding="utf-8"))
                    break
                log.warning("%s is damaged (%s); the one before is taken", path, problem)
        result: tuple[Path, dict[str, Any]] | None = self.world.broadcast(found)
        return result

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Read a checkpoint's values into tensors that are there, however many processes wrote it."""
        try:
            with _alone_is_meant():
                load(tensors, checkpoint_id=path, no_dist=self.world.size == 1)
        except (CheckpointException, RuntimeError, KeyError) as error:
            raise TrainingError(
                f"{path} does not fit the model: {_first_line(error)}",
                cure="resume with the settings that made it, or give another `out`",
            ) from error

    def remove_after(self, step: int) -> None:
        """Take away the checkpoints of later steps, which a run that went back will make anew."""
        if self.world.is_first:
            for path in checkpoints(self.out):
                if int(path.name.removeprefix("step-")) > step:
                    shutil.rmtree(path)
        self.world.barrier()

    def _begin(self, temporary: Path, tensors: dict[str, Tensor]) -> None:
        """An empty folder with room for what comes, or the same error on every process."""
        error = None
        needed = sum(tensor.nbytes for tensor in tensors.values())
        if self.world.is_first:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                free = shutil.disk_usage(self.out).free
                error = _disk_full(self.out, needed, free) if needed > free else None
            except OSError as problem:
                error = TrainingError(f"{self.out} cannot be written ({problem.strerror})")
        error = self.world.broadcast(error)
        if error is not None:
            raise error

    def _write(
        self, temporary: Path, target: Path, tensors: dict[str, Tensor], facts: dict[str, Any], group: Any
    ) -> None:
        is_alone = self.world.size == 1
        try:
            with _alone_is_meant():
                save(tensors, checkpoint_id=temporary, no_dist=is_alone, process_group=group)
            if self.world.is_first:  # all parts are written: process 0 has gathered their metadata
                self._finish(temporary, target, facts)
        except (OSError, CheckpointException, RuntimeError) as error:
            if _is_full(error):
                needed = sum(tensor.nbytes for tensor in tensors.values())
                raise _disk_full(self.out, needed, shutil.disk_usage(self.out).free) from error
            if isinstance(error, OSError):
                raise TrainingError(f"{temporary} cannot be written ({error.strerror})") from error
            raise
        if not is_alone:
            torch.distributed.barrier(group=group)

    def _finish(self, temporary: Path, target: Path, facts: dict[str, Any]) -> None:
        """Hashes, manifest, rename; then the oldest ones go."""
        files = {}
        for path in sorted(temporary.iterdir()):
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            _flush(path)
        write_whole(temporary / MANIFEST, dump({"format": FORMAT, **facts, "files": files}))
        _flush(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _flush(self.out)
        kept = checkpoints(self.out)
        for path in kept[: -self.keep]:
            step = int(path.name.removeprefix("step-"))
            if not (self.keep_every and step % self.keep_every == 0):
                shutil.rmtree(path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file is read and hashed."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for name, facts in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}"
            if _sha256(file) != facts["sha256"]:
                return f"{name} has another sha256 than when it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {_first_line(error)}"
    return None


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """Without the library's remark that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy that later steps do not change; a sharded tensor stays one."""
    if isinstance(tensor, DTensor):
        return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()
    return tensor.detach().to("cpu", copy=True)


def _disk_full(out: Path, needed: int, free: int) -> TrainingError:
    return TrainingError(
        f"the disk is full: a checkpoint in {out} needs {sizes_said(needed)}, {sizes_said(free)} are free",
        cure="free some space, or lower save.keep; the run resumes from the checkpoint before",
    )


def _is_full(error: BaseException) -> bool:
    """Whether a full disk is the reason, also where a library wrapped it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    inner = [failure for failure, _ in getattr(error, "failures", {}).values()]
    return any(_is_full(failure) for failure in inner) or "No space left" in str(error)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"chatglm": __version__, "torch": torch.__version__, "python": platform.python_version()}
