"""What a serving engine does before its first request: compile and capture, measure its steps, check its promise.

It works on free cache blocks and leaves nothing in them that anybody would read.
"""

from __future__ import annotations

import logging
import resource
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .graph_runner import BUCKETS, GraphRunner
from .kv_cache import BLOCK_SIZE
from .row_runner import MIN_ROWS, RowRunner
from .runner import Runner, WholePrefill
from .sampling import SamplingParams
from .sequence import Sequence

logger = logging.getLogger(__name__)

MEASURED_TOKENS = 64
"""Context of the first pass that is timed."""

BUDGET_TOKENS = (32, 512)
"""A slice is never less or more than so many tokens through all layers, whatever was measured."""

REPEATS = 3


@dataclass(frozen=True)
class WarmUp:
    """What was found.

    prefill_budget    tokens times layers that take as long as a token for everybody; None where a pass cannot be paused
    is_invariant      whether rows of a step gave the same bits in a small and in the largest batch
    activation_bytes  what the process or device held at most, beyond what it held before
    """

    prefill_budget: int | None
    is_invariant: bool
    activation_bytes: int


def warm_up(runner: Runner, decode_rows: int, max_running: int) -> WarmUp:
    """Run steps of the smallest and the largest shape, and a first pass.

    decode_rows  sequences of one step; `max_running` take several steps for a token each
    """
    device = runner.model.device
    before = _peak(device)
    rows = min(decode_rows, runner.cache.num_blocks)
    for pool in (runner.cache.keys, runner.cache.values):
        pool[:, : (rows + 1) * BLOCK_SIZE] = 0  # a tuned prefix is read though nobody wrote it
    if isinstance(runner, GraphRunner):
        for bucket in [size for size in BUCKETS if size <= decode_rows]:
            _step(runner, min(bucket, rows))
    few, many = _step(runner, min(MIN_ROWS, rows)), _step(runner, rows)
    is_invariant = bool((few == many[: len(few)]).all())
    budget = _prefill_budget(runner, rows, max_running / decode_rows)
    return WarmUp(budget, is_invariant, max(0, _peak(device) - before))


def tell(found: WarmUp, runner: Runner, *, deterministic: bool) -> None:
    """Warn where something that was promised does not hold on this machine."""
    promises = deterministic or (isinstance(runner, RowRunner) and runner.model.dtype == torch.float32)
    if promises and not found.is_invariant:
        logger.warning(
            "on this machine a row's scores depend on the size of its batch: greedy answers may differ from the same "
            "request's answer alone where two scores are within rounding"
        )


def _sequence(runner: Runner, number: int, tokens: int) -> Sequence:
    """A context of made-up tokens, and one generated token."""
    config = runner.model.config
    mask = config.gmask_token_id
    context = [(number * 131 + place * 17) % min(1_000, config.vocab_size) for place in range(tokens - 1)] + [mask]
    made = Sequence(context, config.bos_token_id, tokens - 1, True, 1, SamplingParams(temperature=0))
    made.generated_ids = [number % min(1_000, config.vocab_size)]
    return made


def _step(runner: Runner, rows: int) -> Tensor:
    """A decode step of `rows` sequences that hold no token yet, each with a block of its own."""
    sequences = [_sequence(runner, number, 1) for number in range(rows)]
    for number, sequence in enumerate(sequences):
        sequence.slots = [(number + 1) * BLOCK_SIZE + place for place in range(BLOCK_SIZE)]
        sequence.cached = runner.prefix_length
        if runner.prefix_length >= BLOCK_SIZE:
            sequence.slots *= -(-(runner.prefix_length + 1) // BLOCK_SIZE)
    return runner.decode(sequences).clone()


def _prefill_budget(runner: Runner, rows: int, steps: float) -> int | None:
    """As many tokens times layers as so many decode steps of the largest batch are worth."""
    capacity = runner.cache.capacity
    most = max(2, min(MEASURED_TOKENS, capacity - runner.prefix_length - BLOCK_SIZE))
    lengths = [max(2, most - 1), most] if isinstance(runner, GraphRunner) else [most]
    for length in lengths:  # kernels have a form for multiples of 16 and one for the rest; the last length is timed
        first = _sequence(runner, 0, length)
        first.generated_ids = []
        first.slots = list(range(BLOCK_SIZE, capacity + BLOCK_SIZE))
        passes = runner.begin([first])
        passes.advance(passes.work_left)
    if isinstance(passes, WholePrefill):
        return None
    layers = runner.model.config.num_layers
    pass_times, step_times = [], []
    for _ in range(REPEATS):
        began = time.perf_counter()
        passes = runner.begin([first])
        passes.advance(passes.work_left)
        pass_times.append(_seconds_since(began, runner))
        began = time.perf_counter()
        _step(runner, rows)
        step_times.append(_seconds_since(began, runner))
    tokens = len(first.context_ids) + 1
    per_token = statistics.median(pass_times) / tokens
    least, most = BUDGET_TOKENS
    return int(min(most, max(least, steps * statistics.median(step_times) / per_token))) * layers


def _seconds_since(began: float, runner: Runner) -> float:
    """Once the device has done what it was given."""
    if runner.model.device.type == "cuda":
        torch.cuda.synchronize(runner.model.device)
    return time.perf_counter() - began


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
