"""Memory and time of a run before it starts: arithmetic, no measurement (but for the speed of a CPU).

A parameter that learns costs 16 bytes whatever the precision (fp32 master, gradient, two moments of AdamW), a frozen
one its own. Activations follow the layer's code; see docs/training.md for the terms and how near they came.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import ModelConfig
from ..engine.placement import choose_device
from .adapters.costs import layer_elements
from .adapters.settings import settings_of
from .attending import has_flex
from .loss import CHUNK_BYTES
from .metrics import flops_per_token, peak_flops
from .preparing import precision_of
from .run_config import RunConfig

STATE_BYTES = 16
"""Of a parameter that learns: 4 master, 4 gradient, 8 AdamW."""
CHECKPOINT_BYTES = 12
"""… on the disk: master and moments."""
LAYER_ELEMENTS = 19
"""Numbers kept for the backward pass, for each token and hidden unit of a layer with an inner size of 4 · hidden."""
EFFICIENCY = 0.4
"""Share of the peak that a run is taken to reach: of a GPU's bf16, or of this CPU's own product of matrices."""
_ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Forecast:
    """Bytes are of one process; `seconds` is None where the device's speed is not known.

    states       master weights, gradients, optimiser
    frozen       weights that do not learn
    activations  kept for the backward pass of one micro-batch, with the narrow copies of weights
    head         logits of one chunk and their gradient, and the weight's where it learns
    disk         one checkpoint, all processes together
    """

    parameters: int
    trained: int
    states: int
    frozen: int
    activations: int
    head: int
    disk: int
    processes: int
    steps: int | None
    tokens_per_step: int
    seconds_per_step: float | None
    device_memory: int | None

    @property
    def memory(self) -> int:
        """Peak of one process."""
        return self.states + self.frozen + self.activations + self.head

    @property
    def seconds(self) -> float | None:
        """Of the whole run."""
        return None if self.seconds_per_step is None or self.steps is None else self.seconds_per_step * self.steps

    @property
    def fits(self) -> bool | None:
        """Whether the device has the memory; None where it is not known."""
        return None if self.device_memory is None else self.memory <= self.device_memory

    def as_mapping(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "memory": self.memory, "seconds": self.seconds, "fits": self.fits}


def forecast(
    run: RunConfig,
    config: ModelConfig,
    *,
    trained: int | None = None,
    frozen_bytes: int = 0,
    steps: int | None = None,
    processes: int | None = None,
) -> Forecast:
    """What a run will need.

    trained       parameters that learn [all]
    frozen_bytes  of weights that do not
    steps         [run.steps]; processes: [those that torchrun started]
    """
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(choose_device(run.compute.device))
    precision = precision_of(run.compute, device)
    learns = config.num_parameters if trained is None else trained
    is_sharded = run.parallel.strategy == "fsdp" or (run.parallel.strategy == "auto" and trained is None)
    share = processes if is_sharded else run.parallel.tensor
    per_token = flops_per_token(config, run.batch.length) * (4 / 3 if run.compute.checkpointing else 1.0)
    tokens = run.batch.rows * run.batch.length
    speed = peak_flops(device) or (_cpu_speed() if device.type == "cpu" else None)
    return Forecast(
        parameters=config.num_parameters,
        trained=learns,
        states=learns * STATE_BYTES // share,
        frozen=frozen_bytes // share,
        activations=activation_bytes(run, config, precision, shares=run.parallel.tensor),
        head=head_bytes(run, config, precision),
        disk=learns * CHECKPOINT_BYTES,
        processes=processes,
        steps=run.steps if steps is None else steps,
        tokens_per_step=tokens,
        seconds_per_step=None if speed is None else per_token * tokens / (speed * EFFICIENCY * processes),
        device_memory=_memory_of(device),
    )


def activation_bytes(run: RunConfig, config: ModelConfig, precision: str, *, shares: int = 1) -> int:
    """Kept by the forward pass of one micro-batch. shares: tensor-parallel processes.

    Weights that learn are fp32, so a narrow run keeps a narrow copy of each that is in use; frozen ones are narrow.
    """
    item, hidden, layers = _ITEM[precision], config.hidden_size, config.num_layers
    tokens = run.batch.micro_rows * run.batch.length
    wide = 4 * hidden  # the inner size that LAYER_ELEMENTS counts with
    adapter = settings_of(run.method)
    if adapter is None:
        elements = LAYER_ELEMENTS + 2 * (config.inner_hidden_size - wide) / hidden
    else:
        elements = layer_elements(config, adapter, item)
    layer = int(tokens * hidden * elements * item / shares)
    layer_parameters = (config.num_parameters - config.vocab_size * hidden) // layers
    narrow = layer_parameters * item // shares if adapter is None and precision != "fp32" else 0
    device = torch.device(choose_device(run.compute.device))
    mask = 0 if has_flex(device, config) else run.batch.micro_rows * run.batch.length**2  # bool
    if run.compute.checkpointing:
        return layers * tokens * hidden * item + layer + narrow + mask
    return layers * (layer + narrow) + mask


def head_bytes(run: RunConfig, config: ModelConfig, precision: str) -> int:
    """One chunk's logits, their exponentials and their gradient. Where the weight learns: its narrow copy in a narrow
    run, and a micro-batch's share of its gradient.
    """
    positions = run.batch.micro_rows * run.batch.length
    item = _ITEM[precision]
    chunk = 3 * min(positions * config.vocab_size * item, CHUNK_BYTES)
    if settings_of(run.method) is not None:
        return chunk
    return chunk + config.vocab_size * config.hidden_size * (4 + (0 if precision == "fp32" else item))


def lines_of(told: Forecast) -> Iterator[str]:
    """For people."""
    yield f"model      {told.parameters:,} parameters, {told.trained:,} of them learn"
    parts = {"states": told.states, "frozen": told.frozen, "activations": told.activations, "head": told.head}
    said = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
    yield f"memory     {_gib(told.memory)} in each of {told.processes} ({said})"
    if told.device_memory is not None:
        yield f"device     {_gib(told.device_memory)}: {'it fits' if told.fits else 'IT DOES NOT FIT'}"
    yield f"disk       {_gib(told.disk)} for each checkpoint"
    steps = f"{told.steps:,} steps of " if told.steps is not None else ""
    yield f"work       {steps}{told.tokens_per_step:,} tokens"
    if told.seconds is not None:
        yield f"time       about {_duration(told.seconds)} at {EFFICIENCY:.0%} of the device's peak"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _memory_of(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _cpu_speed(size: int = 384) -> float:
    """fp32 operations a second of a product of matrices, best of five."""
    left, best = torch.ones(size, size), float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
