"""StepBuffers: the memory of a decode step, allocated once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .fast_network import FastNetwork


class StepBuffers:
    """The tensors that a decode step reads and writes, for up to `batch` sequences; a captured graph keeps them.

    staged                int32 [6, batch]: all that changes from step to step, one copy from the host; its rows are
    ids, lengths          [batch]: the newest token; tokens held, that one counted
    position_base, _step  [2, batch] (kernels.gpu.plain.embed)
    tables                int32 [batch, room]: slots of each sequence
    chosen                int32 [2 * batch], filled as [2, n] for n rows: best tokens, whether all scores were finite
    """

    def __init__(self, network: FastNetwork, batch: int, room: int, no_piece: Tensor | None) -> None:
        config, device = network.config, network.device
        operations = network.operations

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def widest(*names: str) -> int:
            """Elements that the parts of these linears need at most."""
            batches = range(1, batch + 1)
            weights = [getattr(layer, name).weight for layer in network.layers for name in names]
            shapes = {(w.rows, w.columns, w.bits, w.group): w for w in weights}.values()
            return max(int(operations.splits_of(w, n) * n * w.rows) for w in shapes for n in batches)

        self.batch, self.room = batch, room
        hidden = config.hidden_size
        self.staged = new(6, batch, dtype=torch.int32)
        self.ids, self.lengths = self.staged[0], self.staged[1]
        self.position_base, self.position_step = self.staged[2:4], self.staged[4:6]
        self.tables = new(batch, room, dtype=torch.int32)
        self.embedded = new(batch, hidden)
        self.hidden = tuple(new(1, hidden, dtype=network.dtype) for _ in "ab")  # of one sequence, in stream order
        self.cosines, self.sines = new(batch, config.head_dim // 2), new(batch, config.head_dim // 2)
        self.normalised = tuple(new(batch, hidden, dtype=network.dtype) for _ in "ab")
        self.kept = tuple(new(0 if network.is_normalised else batch, hidden) for _ in "ab")
        self.wide, self.narrow = new(widest("qkv")), new(widest("dense", "down"))
        self.mixed = new(batch, hidden, dtype=network.dtype)
        self.inner = new(batch, config.inner_hidden_size, dtype=network.dtype)
        self.logits = new(batch, config.vocab_size)
        pieces = max(operations.pieces_of(config.num_heads, n) * n for n in range(1, batch + 1))
        self.partial = new(pieces * config.num_heads * (config.head_dim + 2))
        self.tickets = new(batch * config.num_heads, dtype=torch.int32)
        chunks = -(-config.vocab_size // 1024)
        self.chunks = (
            new(batch, chunks),
            new(batch, chunks, dtype=torch.int32),
            new(batch, chunks, dtype=torch.int32),
        )
        self.chosen = new(2 * batch, dtype=torch.int32)
        self.no_piece = None if no_piece is None else no_piece.to(device=device, dtype=torch.int8)

    def chosen_of(self, batch: int) -> Tensor:
        """The first 2 · batch numbers of `chosen` as [2, batch]."""
        return self.chosen[: 2 * batch].view(2, batch)
