"""From a loaded model to a serving engine: cache size, runner, step sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint.adapter import Adapter
from ..errors import DeviceError
from ..model import GLM
from .adapters import with_adapter
from .cpu_runner import cache_dtype
from .graph_runner import make_runner
from .kv_cache import BLOCK_SIZE, KVCache
from .loading import LoadedModel
from .placement import free_memory
from .row_runner import RowRunner
from .runner import Runner
from .serving import ServingEngine
from .serving_sampler import ServingSampler
from .serving_state import EngineLimits
from .stream import Stream
from .warm_up import WarmUp, tell, warm_up

logger = logging.getLogger(__name__)

CPU_SHARE, CPU_MOST_BYTES, GPU_SHARE = 0.25, 8 << 30, 0.9

CPU_DECODE_ROWS = 16

WHOLE_PASS_TOKENS = 8_192
"""Tokens of requests that share a first pass which cannot be paused."""


def cache_block_bytes(loaded: LoadedModel) -> int:
    """Bytes of one cache block: keys and values of 16 tokens in every layer."""
    config = loaded.config
    return 2 * BLOCK_SIZE * config.num_layers * config.num_heads * config.head_dim * _cache_dtype(loaded).itemsize


def choose_cache_blocks(loaded: LoadedModel, kv_memory: int | None, max_running: int, prefix: int | None = None) -> int:
    """Cache blocks within `kv_memory` bytes, or within what is free; never more than `max_running` full sequences.

    prefix  tokens of the longest tuned prefix [the model's]
    Raises DeviceError when not even one full-length sequence fits.
    """
    config, device = loaded.config, loaded.model.device
    front = (config.pre_seq_len or 0) if prefix is None else prefix
    longest = -(-(config.max_sequence_length + front) // BLOCK_SIZE) + 1
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


def serving_runner(loaded: LoadedModel, cache: KVCache, no_piece: Tensor | None) -> Runner:
    """The fastest runner; for floating weights on a CPU the one whose results do not depend on the batch."""
    if _keeps_rows_apart(loaded):
        return RowRunner(loaded.model, cache)
    return make_runner(loaded.model, cache, no_piece=no_piece)


class EngineBuilder:
    """Makes engines over the same weights: one at the start, and another where that failed.

    warm  what was found when the first was made
    """

    def __init__(
        self,
        loaded: LoadedModel,
        limits: EngineLimits,
        kv_memory: int | None = None,
        change_logits: Callable[[Tensor, list[Stream]], Tensor] | None = None,
        adapters: Mapping[str, Adapter] | None = None,
    ) -> None:
        """adapters: beside the base, by name.

        Raises DeviceError when not even one full-length sequence fits into the cache.
        """
        tokenizer, config, device = loaded.tokenizer, loaded.config, loaded.model.device
        rows = torch.tensor([tokenizer.has_no_piece(row) for row in range(config.vocab_size)], device=device)
        self._loaded = loaded
        self._no_piece = rows if bool(rows.any()) else None
        self._sampler = ServingSampler(self._no_piece, config.eos_token_id)
        self._change_logits = change_logits
        most = CPU_DECODE_ROWS if device.type == "cpu" else limits.decode_rows
        self.limits = replace(limits, decode_rows=min(limits.decode_rows, limits.max_running, most))
        self._twins = {name: with_adapter(loaded.model, adapter) for name, adapter in (adapters or {}).items()}
        prefix = max(model.config.pre_seq_len or 0 for model in (loaded.model, *self._twins.values()))
        self._blocks = choose_cache_blocks(loaded, kv_memory, limits.max_running, prefix)
        self._cache: KVCache | None = None
        self.warm: WarmUp | None = None

    def __call__(self, *, keep_memory: bool = True) -> ServingEngine:
        """A fresh engine. `keep_memory`: over the cache of the one before, which nobody uses any more.

        Raises DeviceError when there is no room for another cache.
        """
        if self._cache is None or not keep_memory:
            dtype, device = _cache_dtype(self._loaded), self._loaded.model.device
            self._cache = KVCache(self._loaded.config, self._blocks * BLOCK_SIZE, dtype, device)
        self._cache.clear()
        runner = serving_runner(self._loaded, self._cache, self._no_piece)
        if self.limits.deterministic and not isinstance(runner, RowRunner):  # whose rows are apart already
            runner.least_rows, runner.least_length = self.limits.decode_rows, self._loaded.config.max_sequence_length
        if self.warm is None:
            self.warm = warm_up(runner, self.limits.decode_rows, self.limits.max_running)
            tell(self.warm, runner, deterministic=self.limits.deterministic)
            if self._twins and not isinstance(runner, RowRunner):
                logger.info("adapters run in plain PyTorch; the base keeps its %s", type(runner).__name__)
            self.limits = replace(self.limits, prefill_budget=self._budget(self.warm))
        adapters = {name: self._beside(runner, twin) for name, twin in self._twins.items()}
        return ServingEngine(runner, self._sampler, self.limits, change_logits=self._change_logits, adapters=adapters)

    def _beside(self, base: Runner, twin: GLM) -> Runner:
        """The runner of an adapter: rows apart where the base's are, else plain."""
        is_apart = isinstance(base, RowRunner) and twin.config.pre_seq_len is None
        runner = RowRunner(twin, base.cache) if is_apart else Runner(twin, base.cache)
        runner.least_rows, runner.least_length = base.least_rows, base.least_length
        return runner

    def _budget(self, warm: WarmUp) -> int:
        """As asked, as measured, or as many tokens as a pass that cannot be paused should hold."""
        return self.limits.prefill_budget or warm.prefill_budget or WHOLE_PASS_TOKENS * self._loaded.config.num_layers
