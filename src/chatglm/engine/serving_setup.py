"""From a loaded model to a serving engine: cache size, runner, step sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import DeviceError
from .cpu_runner import cache_dtype
from .graph_runner import make_runner
from .kv_cache import BLOCK_SIZE, KVCache
from .loading import LoadedModel
from .placement import free_memory
from .row_runner import RowRunner
from .runner import Runner
from .serving import EngineLimits, ServingEngine
from .serving_sampler import ServingSampler
from .stream import Stream

CPU_SHARE, CPU_MOST_BYTES, GPU_SHARE = 0.25, 8 << 30, 0.9

CPU_DECODE_ROWS = 16
CPU_PREFILL_TOKENS, GPU_PREFILL_TOKENS = 128, 8_192
"""Tokens that run through all layers in one slice of a first pass."""


def cache_block_bytes(loaded: LoadedModel) -> int:
    """Bytes of one cache block: keys and values of 16 tokens in every layer."""
    config = loaded.config
    return 2 * BLOCK_SIZE * config.num_layers * config.num_heads * config.head_dim * _cache_dtype(loaded).itemsize


def choose_cache_blocks(loaded: LoadedModel, kv_memory: int | None, max_running: int) -> int:
    """Cache blocks within `kv_memory` bytes, or within what is free; never more than `max_running` full sequences.

    Raises DeviceError when not even one full-length sequence fits.
    """
    config, device = loaded.config, loaded.model.device
    longest = -(-(config.max_sequence_length + (config.pre_seq_len or 0)) // BLOCK_SIZE) + 1
    size = cache_block_bytes(loaded)
    if kv_memory is None:
        free = free_memory(device)
        if free is None:
            return longest * 8
        budget = min(free * CPU_SHARE, CPU_MOST_BYTES) if device.type == "cpu" else free * GPU_SHARE
    else:
        budget = kv_memory
    blocks = min(int(budget // size) - 1, longest * max_running)  # block 0 is scratch
    if blocks < longest:
        raise DeviceError(
            f"the KV cache would have {max(0, blocks):,} blocks ({budget / 1e6:.0f} MB), one sequence of "
            f"{config.max_sequence_length:,} tokens needs {longest:,} ({longest * size / 1e6:.0f} MB)",
            cure=f"give --kv-memory at least {-(-(longest + 1) * size // (1 << 20))} MiB",
        )
    return blocks


def _keeps_rows_apart(loaded: LoadedModel) -> bool:
    """Whether a RowRunner serves this model."""
    config = loaded.config
    is_plain = config.position_encoding == "learned_2d" or config.pre_seq_len
    return loaded.model.device.type == "cpu" and not is_plain and not config.quantization_bit


def _cache_dtype(loaded: LoadedModel) -> torch.dtype:
    return loaded.model.dtype if _keeps_rows_apart(loaded) else cache_dtype(loaded.model)


def serving_runner(loaded: LoadedModel, blocks: int, no_piece: Tensor | None) -> Runner:
    """The fastest runner; for floating weights on a CPU the one whose results do not depend on the batch."""
    model = loaded.model
    cache = KVCache(loaded.config, blocks * BLOCK_SIZE, _cache_dtype(loaded), model.device)
    if _keeps_rows_apart(loaded):
        return RowRunner(model, cache)
    return make_runner(model, cache, no_piece=no_piece)


def engine_builder(
    loaded: LoadedModel,
    limits: EngineLimits,
    kv_memory: int | None = None,
    change_logits: Callable[[Tensor, list[Stream]], Tensor] | None = None,
) -> Callable[[], ServingEngine]:
    """A function that makes a fresh engine over the same weights and cache memory."""
    tokenizer, config, device = loaded.tokenizer, loaded.config, loaded.model.device
    rows = torch.tensor([tokenizer.has_no_piece(row) for row in range(config.vocab_size)], device=device)
    no_piece = rows if bool(rows.any()) else None
    sampler = ServingSampler(no_piece, config.eos_token_id)
    is_cpu = device.type == "cpu"
    limits = replace(
        limits,
        decode_rows=min(limits.decode_rows, CPU_DECODE_ROWS) if is_cpu else limits.decode_rows,
        prefill_budget=(CPU_PREFILL_TOKENS if is_cpu else GPU_PREFILL_TOKENS) * config.num_layers,
    )
    blocks = choose_cache_blocks(loaded, kv_memory, limits.max_running)

    def build() -> ServingEngine:
        return ServingEngine(serving_runner(loaded, blocks, no_piece), sampler, limits, change_logits=change_logits)

    return build
