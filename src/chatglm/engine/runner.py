"""Runner: the two places where the network runs, over batches of sequences.

Everything follows from lengths: masks, positions and cache slots. Token ids are only looked up.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor

from ..model import GLM, Attend, sdpa_attention
from ..model.positions import Layout, generation_positions, prefix_blocked
from .kv_cache import DecodeView, KVCache, PrefillView
from .sampler import Sampler, Samples
from .sequence import Sequence


class Prefill(Protocol):
    """A first pass under way. work_left: tokens times layers that are still to be run."""

    @property
    def work_left(self) -> int: ...

    def advance(self, budget: int) -> Tensor | None:
        """Run layers worth about `budget` (tokens times layers), at least one; logits once all layers have run."""
        ...


class Layers(Protocol):
    """A first pass that knows its layers."""

    @property
    def tokens(self) -> int: ...

    @property
    def layers_left(self) -> int: ...

    def advance(self, layers: int) -> Tensor | None:
        """Run so many layers; logits of each sequence's last token after the last one."""
        ...


class SlicedPrefill:
    """A first pass over several sequences that can be paused between layers.

    work_left  tokens times layers that are still to be run
    """

    def __init__(self, first_pass: Layers, sequences: list[Sequence], cached: list[int]) -> None:
        self._pass, self._sequences, self._cached = first_pass, sequences, cached

    @property
    def work_left(self) -> int:
        return self._pass.tokens * self._pass.layers_left

    def advance(self, budget: int) -> Tensor | None:
        """Run layers worth about `budget` (tokens times layers), at least one.

        Returns fp32 logits [sequences, vocab] of each one's last token once all layers have run.
        """
        logits = self._pass.advance(max(1, budget // self._pass.tokens))
        if logits is not None:
            for sequence, cached in zip(self._sequences, self._cached, strict=True):
                sequence.cached = cached
        return logits


class Runner:
    """Runs `model` over `cache`. Its results, fp32 logits [batch, vocab], are those of each sequence's last token.

    least_rows    rows of the smallest decode step; missing ones are scratch
    least_length  length that keys are padded to at least. Both give every step one shape, so that a row's result does
                  not depend on who else runs
    """

    least_rows = 1
    least_length = 1

    def __init__(self, model: GLM, cache: KVCache, attend: Attend = sdpa_attention) -> None:
        self.model = model
        self.cache = cache
        self.attend = attend
        self.prefix_length = model.config.pre_seq_len or 0

    def begin(self, sequences: list[Sequence]) -> Prefill:
        """A first pass over these sequences, to be run with `advance` in the finest slices that there are; slots must
        be allocated.
        """
        return WholePrefill(self, sequences)

    def slots_needed(self, sequence: Sequence) -> int:
        """Cache slots of the whole sequence; the last token is never fed back."""
        return self.prefix_length + sequence.num_prompt_tokens + sequence.max_new - 1

    @torch.inference_mode()
    def prefill(self, sequences: list[Sequence]) -> Tensor:
        """First pass over contexts (and, after a preemption, what was generated so far); slots must be allocated."""
        device = self.model.device
        rows = [[*s.context_ids, s.start_id, *s.generated_ids] for s in sequences]
        total = max(map(len, rows))
        padding = [total - len(row) for row in rows]
        pad_id = self.model.config.pad_token_id
        ids = torch.tensor([[pad_id] * pad + row for pad, row in zip(padding, rows, strict=True)], device=device)
        layout = self._layout(sequences, padding)
        blocked = prefix_blocked(layout, total)
        slots = [
            sequence.slots[: self.prefix_length] + [0] * pad + sequence.slots[self.prefix_length :][: len(row)]
            for sequence, pad, row in zip(sequences, padding, rows, strict=True)
        ]
        view = PrefillView(self.cache, torch.tensor(slots, device=device))
        positions = generation_positions(layout, total, self.model.config)
        hidden = self.model.transformer(ids, positions, blocked, view, attend=self.attend)
        for sequence, row in zip(sequences, rows, strict=True):
            sequence.cached = self.prefix_length + len(row)
        return self.model.logits(hidden[:, -1])

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> Tensor:
        """One step: feed each sequence's newest token."""
        tokens = torch.tensor([s.generated_ids[-1] for s in sequences], device=self.model.device)
        tables = [s.slots[: s.cached + 1] for s in sequences]
        for sequence in sequences:
            sequence.cached += 1
        missing = self.least_rows - len(sequences)
        if missing <= 0:
            return self.step(tokens, tables, sequences)
        owners = [*sequences, *[sequences[-1]] * missing]
        tables += [[0] * (self.prefix_length + 1)] * missing
        return self.step(torch.cat((tokens, tokens.new_zeros(missing))), tables, owners)[:-missing]

    def decode_and_sample(self, sequences: list[Sequence], sampler: Sampler) -> Samples:
        """One step, and a token for each sequence."""
        return sampler(self.decode(sequences), sequences)

    @torch.inference_mode()
    def step(self, tokens: Tensor, tables: list[list[int]], owners: list[Sequence]) -> Tensor:
        """The network over one new token a row.

        tokens  int64 [batch]
        tables  the slots of each row, the new token's last; rows may share slots
        owners  the sequence whose context each row continues
        """
        device = self.model.device
        lengths = [len(table) for table in tables]
        longest = max(*lengths, self.least_length)
        blocked: Tensor | None = None
        if min(lengths) < longest:
            held = torch.tensor(lengths, device=device)
            blocked = (torch.arange(longest, device=device) >= held[:, None])[:, None, None]  # [batch, 1, 1, key]
        write = torch.tensor([table[-1:] for table in tables], device=device)
        view = DecodeView(self.cache, write, _read_slots(tables, longest, device), longest)
        layout = self._layout(owners, [0] * len(owners))
        index = torch.tensor(lengths, device=device) - 1 - self.prefix_length  # place of each new token
        positions = self._positions_at(layout, index)
        hidden = self.model.transformer(tokens[:, None], positions, blocked, view, attend=self.attend)
        return self.model.logits(hidden[:, -1])

    @torch.inference_mode()
    def verify(self, sequence: Sequence, draft: list[int]) -> Tensor:
        """Feed the newest token and a draft of what may follow; fp32 logits [draft + 1, vocab], one row after each.

        `sequence.cached` counts the newest token only; the caller adds the draft tokens that it accepts.
        """
        device = self.model.device
        tokens = torch.tensor([[sequence.generated_ids[-1], *draft]], device=device)
        start, new = sequence.cached, len(draft) + 1
        table = sequence.slots[: start + new]
        write = torch.tensor([table[start:]], device=device)
        view = DecodeView(self.cache, write, _read_slots([table], start + new, device), start + new)
        blocked = torch.ones(new, start + new, dtype=torch.bool, device=device).triu(start + 1)[None, None]
        layout = self._layout([sequence], [0])
        first = torch.tensor([start - self.prefix_length], device=device)
        shifted = Layout(layout.context_lengths, layout.mask_places, layout.is_gmask, -first)
        positions = generation_positions(shifted, new, self.model.config)
        hidden = self.model.transformer(tokens, positions, blocked, view, attend=self.attend)
        sequence.cached += 1
        return self.model.logits(hidden[0])

    def _layout(self, sequences: list[Sequence], padding: list[int]) -> Layout:
        device = self.model.device
        return Layout(
            torch.tensor([len(s.context_ids) for s in sequences], device=device),
            torch.tensor([s.mask_place for s in sequences], device=device),
            torch.tensor([s.is_gmask for s in sequences], device=device),
            torch.tensor(padding, device=device),
        )

    def _positions_at(self, layout: Layout, index: Tensor) -> Tensor:
        """Positions of the single tokens at `index` [batch], as if each row were padded so that they stood at 0."""
        shifted = Layout(layout.context_lengths, layout.mask_places, layout.is_gmask, -index)
        return generation_positions(shifted, 1, self.model.config)


def _read_slots(tables: list[list[int]], longest: int, device: torch.device) -> Tensor | slice:
    """The slots to read, [batch, longest] with scratch slots at the end; a slice where one table is a run."""
    table = tables[0]
    is_run = len(table) == longest and all(b - a == 1 for a, b in itertools.pairwise(table))
    if len(tables) == 1 and is_run:
        return slice(table[0], table[-1] + 1)
    return torch.tensor([row + [0] * (longest - len(row)) for row in tables], device=device)


class WholePrefill:
    """The same contract over a runner whose first pass cannot be paused."""

    def __init__(self, runner: Runner, sequences: list[Sequence]) -> None:
        self._runner, self._sequences = runner, sequences
        tokens = sum(s.num_prompt_tokens + len(s.generated_ids) for s in sequences)
        self.work_left = tokens * runner.model.config.num_layers

    def advance(self, budget: int) -> Tensor | None:
        """All of it, whatever the budget."""
        self.work_left = 0
        return self._runner.prefill(self._sequences)
