"""What the machine can do at best, measured: bytes a second and operations a second of plain library calls.

Every speed that this project reports stands beside these, from the same process and the same number of threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

GPU_BYTES, CPU_BYTES = 8 << 30, 1 << 30
"""Bytes of the largest copy; less where memory is short. Far more than any cache holds."""

GPU_EDGE, CPU_EDGE = 8192, 2048
"""Rows and columns of the matrices."""


@dataclass(frozen=True)
class Limits:
    """Bytes read and written a second by a copy, bytes read a second by a sum, operations a second of a product."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    matmul_flops_per_s: float

    def bandwidth(self, device: torch.device) -> float:
        """What a decode step is held against: the copy on a GPU, the faster of both tests on a CPU."""
        if device.type == "cuda":
            return self.copy_bytes_per_s
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)


def measure_limits(device: torch.device, dtype: torch.dtype, repeats: int = 20) -> Limits:
    """Median rates over `repeats` calls. dtype: of the matrix product."""
    is_cuda = device.type == "cuda"
    size = GPU_BYTES if is_cuda else CPU_BYTES
    if is_cuda:
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    few = repeats if is_cuda else 5
    copy, read = _memory_rates(size, device, few)
    edge = GPU_EDGE if is_cuda else CPU_EDGE
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in "ab")
    product = 2 * edge**3 / median_seconds(lambda: left @ right, device, few)
    return Limits(copy, read, product)


def _memory_rates(size: int, device: torch.device, repeats: int) -> tuple[float, float]:
    """Bytes a second of a copy (read and written) and of a sum (read)."""
    source = torch.empty(size // 4, dtype=torch.float32, device=device).uniform_()
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device, repeats)
    return 2 * source.nbytes / copy, source.nbytes / median_seconds(source.sum, device, repeats)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call, after two that do not count."""
    return statistics.median(seconds_of(work, device, repeats))


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 2) -> list[float]:
    """Times of calls, the device's work included."""
    for _ in range(warm_up):
        work()
    synchronize(device)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return times


def synchronize(device: torch.device) -> None:
    """Wait for what was started on a device that works behind the program's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
