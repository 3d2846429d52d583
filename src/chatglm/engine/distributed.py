"""One engine over several devices: rank 0 schedules and samples, every rank runs its part of each pass.

Workers keep a mirror of each running sequence, so a decode step sends only the newest tokens.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from ..model import GLM
from ..parallel import ProcessGroup, join_group
from .cpu_runner import cache_dtype
from .kv_cache import KVCache
from .runner import Runner
from .sequence import Sequence

STOP = ("stop",)

LoadPart = Callable[[torch.device, ProcessGroup], GLM]
"""Makes one rank's part of a model on its device. Other processes get it too: a function of a module, or a partial."""


class LeadingRunner(Runner):
    """Rank 0's runner: tells the workers what to run, then runs its own part."""

    def __init__(self, model: GLM, cache: KVCache, group: ProcessGroup) -> None:
        super().__init__(model, cache)
        self.group = group
        self._is_told = False

    def prefill(self, sequences: list[Sequence]) -> Tensor:
        """As Runner's; the workers get the sequences whole."""
        self.group.broadcast(("prefill", sequences))
        return super().prefill(sequences)

    def decode(self, sequences: list[Sequence]) -> Tensor:
        """As Runner's; the workers get the newest tokens."""
        self.group.broadcast(("decode", [(s.number, s.cached, s.generated_ids[-1]) for s in sequences]))
        with self._told():
            return super().decode(sequences)

    def step(self, tokens: Tensor, tables: list[list[int]], owners: list[Sequence]) -> Tensor:
        """As Runner's."""
        if not self._is_told:
            self.group.broadcast(("step", tokens.tolist(), tables, [s.number for s in owners]))
        return super().step(tokens, tables, owners)

    def verify(self, sequence: Sequence, draft: list[int]) -> Tensor:
        """As Runner's."""
        self.group.broadcast(("verify", (sequence.number, sequence.cached, sequence.generated_ids[-1]), draft))
        return super().verify(sequence, draft)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        self._is_told = True
        try:
            yield
        finally:
            self._is_told = False


def follow(runner: Runner, group: ProcessGroup) -> None:
    """A worker's life: run what rank 0 tells, until it says stop."""
    mirrors: dict[int, Sequence] = {}

    def mirror(number: int, cached: int, token: int) -> Sequence:
        sequence = mirrors[number]
        sequence.cached, sequence.generated_ids = cached, [token]
        return sequence

    while (message := group.broadcast()) != STOP:
        match message:
            case ("prefill", sequences):
                taken = {slot for sequence in sequences for slot in sequence.slots}
                gone = [number for number, old in mirrors.items() if not taken.isdisjoint(old.slots)]
                for number in gone:
                    del mirrors[number]
                mirrors |= {sequence.number: sequence for sequence in sequences}
                runner.prefill(sequences)
            case ("decode", newest):
                runner.decode([mirror(*each) for each in newest])
            case ("step", tokens, tables, numbers):
                ids = torch.tensor(tokens, device=runner.model.device)
                runner.step(ids, tables, [mirrors[number] for number in numbers])
            case ("verify", newest, draft):
                runner.verify(mirror(*newest), draft)


@dataclass
class Team:
    """Rank 0 and its worker processes."""

    group: ProcessGroup
    device: torch.device
    workers: Any
    meeting_place: tempfile.TemporaryDirectory[str]

    def close(self) -> None:
        """Let the workers go home. Raises what a worker failed with; this process is out of the group all the same."""
        try:
            self.group.broadcast(STOP)
            self.workers.join()
        finally:
            self.group.leave()
            self.meeting_place.cleanup()


def device_of(rank: int, device: torch.device) -> torch.device:
    """CUDA devices are numbered from the first one; other devices are shared."""
    return torch.device("cuda", rank) if device.type == "cuda" else device


def load_part(folder: Path, dtype: str, device: torch.device, group: ProcessGroup) -> GLM:
    """One rank's part of a checkpoint folder."""
    from .loading import load_model

    return load_model(folder, dtype, str(device), group=group).model


def gather_team(load: LoadPart, device: torch.device, world_size: int, capacity: int) -> Team:
    """Start `world_size - 1` workers that load their part of the model and wait; join them as rank 0.

    load      run by every worker; rank 0 does it after this
    capacity  tokens of every rank's KV cache
    """
    place = tempfile.TemporaryDirectory(prefix="chatglm-")
    arguments = (Path(place.name) / "group", load, str(device), world_size, capacity)
    workers = spawn(_work, arguments, nprocs=world_size - 1, join=False, daemon=True)
    first = device_of(0, device)
    return Team(join_group(arguments[0], 0, world_size, first), first, workers, place)


def _work(index: int, place: Path, load: LoadPart, device_name: str, world_size: int, capacity: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is for rank 0
    rank = index + 1
    device = device_of(rank, torch.device(device_name))
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    group = join_group(place, rank, world_size, device)
    model = load(device, group)
    follow(Runner(model, cache_of(model, capacity)), group)
    group.leave()


def cache_of(model: GLM, capacity: int) -> KVCache:
    """A KV cache for the heads that this rank has. capacity: tokens."""
    from ..parallel.sharding import local_heads

    heads = local_heads(model)
    is_whole = heads == model.config.num_heads
    dtype = cache_dtype(model) if is_whole else model.dtype
    return KVCache(model.config, capacity, dtype, model.device, num_heads=heads)
