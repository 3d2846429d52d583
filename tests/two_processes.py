"""Two processes on this machine that form one Gloo group for a test, as `torchrun` would start them.

They are started once and wait for the next test module, because starting costs more than most tests.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

Body = Callable[[int, Path], None]
"""`body(rank, folder)`: a function of a module."""


class _Pair:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, body: Body, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for pipe in self.pipes:
            pipe.send(sys.path)
            pipe.send((body, folder, port))
        left = list(self.pipes)
        while left:
            for pipe in wait(left):
                assert isinstance(pipe, Connection)
                problem = pipe.recv()
                if problem is not None:  # the other one may wait for this one for ever
                    raise AssertionError(problem)
                left.remove(pipe)

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()


_pair: _Pair | None = None


def in_two_processes(body: Body, folder: Path) -> None:
    """Run `body` in both processes; raises AssertionError with the traceback of the first that fails."""
    global _pair
    if _pair is None:
        _pair = _Pair()
        atexit.register(_end)
    try:
        _pair.run(body, folder)
    except BaseException:
        _end()
        raise


def _end() -> None:
    global _pair
    if _pair is not None:
        _pair.end()
        _pair = None


def _serve(rank: int, pipe: Connection) -> None:
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    while True:
        try:
            sys.path = pipe.recv()
        except EOFError:  # nobody will ask again
            return
        try:
            body, folder, port = pipe.recv()
            os.environ["MASTER_PORT"] = str(port)
            torch.distributed.init_process_group("gloo")
            body(rank, folder)
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        except BaseException:
            pipe.send(f"process {rank}:\n{traceback.format_exc()}")
            return
        pipe.send(None)
