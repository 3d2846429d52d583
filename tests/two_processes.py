"""Two processes on this machine in one Gloo group, as `torchrun` would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing


def _work(rank: int, body: Callable[[int, Path], None], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo")
    body(rank, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def in_two_processes(body: Callable[[int, Path], None], folder: Path) -> None:
    """Run `body(rank, folder)`, a function of a module, in two processes; raises what one of them raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_work, args=(body, folder, port), nprocs=2)
