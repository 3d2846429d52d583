"""CpuRunner: the Runner's contract over native kernels (kernels/cpu), whole passes at a time.

Decode steps run natively for every form of the weights, first passes for quantised ones. The context's keys and values
are read as the cache stores them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import cpu
from ..kernels.probe import choose_kernels
from ..model import GLM, Attend, sdpa_attention
from ..model.positions import generation_positions
from .kv_cache import KVCache
from .runner import Runner, SlicedPrefill, WholePrefill
from .sequence import Sequence

if TYPE_CHECKING:
    from ..kernels.cpu.network import CpuNetwork

MOST_PREFILL_TOKENS = 2_048
"""Tokens of one first pass; more sequences follow in another. Bounds the memory of activations."""

VERIFIED_AT_ONCE = 4
"""Draft tokens in one pass: with so few, each gives the bits that it would give alone."""


def native_runner(model: GLM, cache: KVCache, attend: Attend = sdpa_attention) -> Runner:
    """A CpuRunner with as many threads as PyTorch uses. Raises fast_network.Unsupported."""
    from ..kernels.cpu.network import CpuNetwork
    from ..kernels.cpu.weights import Unsupported as NoKernels
    from .fast_network import Unsupported

    try:
        workers = cpu.worker_threads(torch.get_num_threads())
        network = CpuNetwork(model, cache.keys, cache.values, cpu.kernel_kit(), workers)
    except NoKernels as error:
        raise Unsupported(str(error)) from error
    return CpuRunner(model, cache, network, attend)


def cache_dtype(model: GLM) -> torch.dtype:
    """The dtype of a KV cache: fp16 on a CPU whose kernels read it beside weights as narrow, else the model's."""
    if model.device.type != "cpu" or choose_kernels(None, model.device) != "native":
        return model.dtype
    weight = model.transformer.layers[0].get_submodule("attention.dense").weight
    return model.dtype if weight.dtype in (torch.float32, torch.bfloat16) else torch.float16


class CpuRunner(Runner):
    """Runs `model` through a CpuNetwork over the same cache. Logits of a decode are valid until the next step."""

    def __init__(self, model: GLM, cache: KVCache, network: CpuNetwork, attend: Attend = sdpa_attention) -> None:
        super().__init__(model, cache, attend)
        self.network = network

    @torch.inference_mode()
    def prefill(self, sequences: list[Sequence]) -> Tensor:
        """First pass over contexts, laid one after the other without padding."""
        if not self.network.can_prefill:
            return super().prefill(sequences)
        return torch.cat([self._prefill(part) for part in _parts(sequences)])

    def _prefill(self, sequences: list[Sequence]) -> Tensor:
        pending = self.begin(sequences)
        logits = pending.advance(pending.work_left)
        assert logits is not None
        return logits

    def begin(self, sequences: list[Sequence]) -> SlicedPrefill | WholePrefill:
        """See Runner.begin."""
        if not self.network.can_prefill:
            return WholePrefill(self, sequences)
        contents = [[*s.context_ids, s.start_id, *s.generated_ids] for s in sequences]
        front = self.prefix_length
        slots = [s.slots[front : front + len(row)] for s, row in zip(sequences, contents, strict=True)]
        layout = self._layout(sequences, [0] * len(sequences))
        padded = generation_positions(layout, max(map(len, contents)), self.model.config)
        positions = torch.cat([padded[i, ..., : len(row)] for i, row in enumerate(contents)], dim=-1)[None]
        first_pass = self.network.begin(
            torch.tensor([token for row in contents for token in row]),
            positions,
            torch.tensor([slot for table in slots for slot in table], dtype=torch.int32),
            [(len(row), len(s.context_ids)) for s, row in zip(sequences, contents, strict=True)],
            torch.tensor([s.slots[:front] for s in sequences], dtype=torch.int32) if front else None,
        )
        return SlicedPrefill(first_pass, sequences, [front + len(row) for row in contents])

    @torch.inference_mode()
    def step(self, tokens: Tensor, tables: list[list[int]], owners: list[Sequence]) -> Tensor:
        """The network over one new token a row; see Runner.step."""
        layout = self._layout(owners, [0] * len(owners))
        index = torch.tensor([len(table) for table in tables]) - 1 - self.prefix_length  # place of each new token
        return self.network.decode(tokens, self._positions_at(layout, index), tables)

    @torch.inference_mode()
    def verify(self, sequence: Sequence, draft: list[int]) -> Tensor:
        """Feed the newest token and a draft of what may follow; see Runner.verify."""
        tokens = [sequence.generated_ids[-1], *draft]
        start = sequence.cached
        results = []
        for first in range(0, len(tokens), VERIFIED_AT_ONCE):
            part = tokens[first : first + VERIFIED_AT_ONCE]
            tables = [sequence.slots[: start + first + number + 1] for number in range(len(part))]
            results.append(self.step(torch.tensor(part), tables, [sequence] * len(part)).clone())
        sequence.cached += 1
        return torch.cat(results)


def _parts(sequences: list[Sequence]) -> list[list[Sequence]]:
    """Sequences in lots of at most MOST_PREFILL_TOKENS tokens; a longer one stands alone."""
    parts: list[list[Sequence]] = [[]]
    held = 0
    for sequence in sequences:
        tokens = sequence.num_prompt_tokens + len(sequence.generated_ids)
        if parts[-1] and held + tokens > MOST_PREFILL_TOKENS:
            parts.append([])
            held = 0
        parts[-1].append(sequence)
        held += tokens
    return parts
