"""The processes that hold one model: rank 0 is the caller's own, the others wait for its commands."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

WAIT = timedelta(hours=24 * 365)
"""How long a worker waits for the next command: a chat may rest for days."""


@dataclass(frozen=True)
class ProcessGroup:
    """One rank's view of the group. `handle` sums tensors on the device, `commands` carries Python objects."""

    rank: int
    world_size: int
    handle: Any
    commands: Any

    def broadcast(self, message: Any = None) -> Any:
        """Rank 0's message, on every rank."""
        box = [message]
        torch.distributed.broadcast_object_list(box, src=0, group=self.commands)
        return box[0]

    def leave(self) -> None:
        """Take this process out of the group."""
        torch.distributed.destroy_process_group()


def join_group(meeting_place: Path, rank: int, world_size: int, device: torch.device) -> ProcessGroup:
    """Join (rank 0: open) the group that meets at a file. NCCL sums on CUDA, Gloo elsewhere; Gloo carries commands."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks share one machine
    is_cuda = device.type == "cuda"
    torch.distributed.init_process_group(
        "nccl" if is_cuda else "gloo",
        init_method=f"file://{meeting_place}",
        rank=rank,
        world_size=world_size,
        timeout=WAIT,
        device_id=device if is_cuda else None,
    )
    world = torch.distributed.group.WORLD
    commands = torch.distributed.new_group(backend="gloo", timeout=WAIT) if is_cuda else world
    return ProcessGroup(rank, world_size, world, commands)
