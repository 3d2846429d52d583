"""GraphRunner: the Runner's contract over kernels, a decode step as one captured CUDA graph for each batch bucket.

Inputs lie in static buffers; what a step needs from the host goes over in one small copy, and slot tables only when
the batch changes. All graphs share one memory pool. Where a graph cannot be captured the same launches run one by
one, and where the kernels have no form for a model, its plain Runner runs; each says so in one log line.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from ..kernels.gpu import operations
from ..kernels.probe import can_overlap, choose_kernels
from ..model import GLM, Attend, sdpa_attention
from ..model.positions import generation_positions
from .cpu_runner import native_runner
from .fast_network import FastNetwork, Unsupported
from .fast_prefill import FirstPass
from .kv_cache import KVCache
from .runner import Runner, SlicedPrefill, WholePrefill
from .sampler import Sampler, Samples
from .sequence import Sequence
from .step_buffers import StepBuffers

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Batch sizes with a graph of their own; a batch runs in the next larger one, a larger batch in parts of 64."""


TableKey = tuple[int, int, int]
"""Of a slot table that lies in a row: the sequence's number, its list of slots, and how many those are."""

SCRATCH: TableKey = (-1, -1, -1)
"""In place of a sequence: a row of the bucket without one. It writes to and reads from slot 0."""


def make_runner(
    model: GLM,
    cache: KVCache,
    *,
    kernels: str | None = None,
    no_piece: Tensor | None = None,
    attend: Attend = sdpa_attention,
) -> Runner:
    """The fastest runner that this device and model have: a GraphRunner over Triton kernels, a CpuRunner over native
    ones, or the plain one.

    kernels   auto, triton, native or torch; None asks the environment (kernels.probe)
    no_piece  bool [vocab]: rows that are never chosen
    """
    chosen = choose_kernels(kernels, model.device)
    try:
        if chosen == "triton":
            return GraphRunner(model, cache, "triton", no_piece=no_piece, attend=attend)
        if chosen == "native":
            return native_runner(model, cache, attend)
    except Unsupported as error:
        logger.info("kernels: %s; plain PyTorch runs instead", error)
    return Runner(model, cache, attend)


SCRATCH_STEP = numpy.array([[0], [1], [0], [0], [0], [0]], dtype=numpy.int32)
"""What is staged for a row without a sequence: token 0 as the only one."""


@dataclass
class StepAhead:
    """A step that was started before the tokens it was fed were seen."""

    turn: int
    keys: list[TableKey]
    lengths: list[int]
    tokens: list[int]

    def fits(self, sequences: list[Sequence]) -> bool:
        """Whether it is the step that these sequences need now."""
        return (
            [s.cached for s in sequences] == self.lengths
            and [s.generated_ids[-1] for s in sequences] == self.tokens
            and [_key(s) for s in sequences] == self.keys
        )


class GraphRunner(Runner):
    """Runs `model` through FastNetwork. Logits lie in a static buffer: valid until the next step."""

    def __init__(
        self,
        model: GLM,
        cache: KVCache,
        kind: str,
        *,
        no_piece: Tensor | None = None,
        attend: Attend = sdpa_attention,
        use_graphs: bool = True,
    ) -> None:
        super().__init__(model, cache, attend)
        device = model.device
        self.network = FastNetwork(model, operations(kind))
        self.use_graphs = use_graphs and device.type == "cuda"
        self.overlap = kind == "triton" and can_overlap(device)  # for one sequence; it slowed batches down
        room = min(cache.capacity, model.config.max_sequence_length + self.prefix_length)
        self.buffers = StepBuffers(self.network, BUCKETS[-1], -(-room // 16) * 16, no_piece)
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None
        is_cuda = device.type == "cuda"
        self._staged = torch.zeros(6, BUCKETS[-1], dtype=torch.int32, pin_memory=is_cuda)
        self._results = [torch.zeros(2 * BUCKETS[-1], dtype=torch.int32, pin_memory=is_cuda) for _ in "ab"]
        self._events = [torch.cuda.Event() if is_cuda else None for _ in "ab"]
        self._turn = 0
        self._held: list[TableKey | None] = [None] * BUCKETS[-1]  # whose table lies in which row
        self._ahead: StepAhead | None = None

    @torch.inference_mode()
    def prefill(self, sequences: list[Sequence]) -> Tensor:
        """First pass over contexts, laid one after the other without padding."""
        if self.prefix_length:
            return super().prefill(sequences)
        pending = self.begin(sequences)
        logits = pending.advance(pending.work_left)
        assert logits is not None
        return logits

    @torch.inference_mode()
    def begin(self, sequences: list[Sequence]) -> SlicedPrefill | WholePrefill:
        """See Runner.begin."""
        if self.prefix_length:
            return WholePrefill(self, sequences)
        device = self.model.device
        contents = [[*s.context_ids, s.start_id, *s.generated_ids] for s in sequences]
        ids = torch.tensor([token for row in contents for token in row], device=device)
        slots = torch.tensor(
            [slot for s, row in zip(sequences, contents, strict=True) for slot in s.slots[: len(row)]], device=device
        )
        layout = self._layout(sequences, [0] * len(sequences))
        longest = max(map(len, contents))
        padded = generation_positions(layout, longest, self.model.config)  # [sequences, (2,) longest]
        positions = torch.cat([padded[i, ..., : len(row)] for i, row in enumerate(contents)], dim=-1)[None]
        rows = [(len(row), len(s.context_ids)) for s, row in zip(sequences, contents, strict=True)]
        first_pass = FirstPass(self.network, ids, positions, slots, rows, self.cache)
        return SlicedPrefill(first_pass, sequences, [len(row) for row in contents])

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> Tensor:
        """One step: feed each sequence's newest token."""
        if any(s.cached + 1 > self.buffers.room for s in sequences):
            return super().decode(sequences)
        parts = [sequences[start : start + BUCKETS[-1]] for start in range(0, len(sequences), BUCKETS[-1])]
        if len(parts) > 1:
            return torch.cat([self.decode(part).clone() for part in parts])
        self._feed(sequences)
        return self._run(len(sequences))

    def decode_and_sample(self, sequences: list[Sequence], sampler: Sampler) -> Samples:
        """One step and its tokens; all on the device, and one step ahead, where every sequence takes the best one."""
        is_same_choice = (sampler.no_piece is None) == (self.buffers.no_piece is None)
        if is_same_choice and all(map(sampler.takes_the_best, sequences)):
            return self.decode_greedy(sequences)
        return super().decode_and_sample(sequences, sampler)

    @torch.inference_mode()
    def decode_greedy(self, sequences: list[Sequence]) -> Samples:
        """One step that ends in the best tokens, chosen on the device (rows in `no_piece` never).

        The step after it starts at once, with those tokens and before the host has seen them: where the same sequences
        come again, its results are there or on their way. Where they do not, it is forgotten: what it wrote lies behind
        the end of each sequence, in slots that whoever comes next writes first.
        """
        if len(sequences) > BUCKETS[-1] or any(s.cached + 1 > self.buffers.room for s in sequences):
            return greedy_samples(self.decode(sequences), self.buffers.no_piece)
        ahead = self._ahead
        if ahead is not None and ahead.fits(sequences):
            turn = ahead.turn
            for sequence in sequences:
                sequence.cached += 1
        else:
            self._feed(sequences)
            turn = self._start(len(sequences))
        keys = [_key(s) for s in sequences]
        has_room = all(s.cached + 1 <= self.buffers.room for s in sequences)
        following = self._start(len(sequences)) if has_room else None
        tokens, is_finite = self._read(turn, len(sequences))
        lengths = [s.cached for s in sequences]
        self._ahead = None if following is None else StepAhead(following, keys, lengths, tokens)
        return Samples(tokens, is_finite)

    def _start(self, count: int) -> int:
        """Start a step over what lies in the buffers, and the copy of its best tokens; the place of the results."""
        self._run(count, forget=False)
        self._turn ^= 1
        bucket = self._bucket(count)
        self._results[self._turn][: 2 * bucket].copy_(self.buffers.chosen[: 2 * bucket], non_blocking=True)
        event = self._events[self._turn]
        if event is not None:
            event.record()
        return self._turn

    def _read(self, turn: int, count: int) -> tuple[list[int], list[bool]]:
        """Wait for the results of a step: tokens, and whether their scores were finite."""
        event = self._events[turn]
        if event is not None:
            event.synchronize()
        bucket = self._bucket(count)
        numbers = self._results[turn][: bucket + count].tolist()
        return numbers[:count], [flag == 1 for flag in numbers[bucket:]]

    def _feed(self, sequences: list[Sequence]) -> None:
        """The newest token of each sequence, and where it stands, into the buffers."""
        self._set_tables([s.slots for s in sequences], [_key(s) for s in sequences])
        for sequence in sequences:
            sequence.cached += 1
        self._stage([s.generated_ids[-1] for s in sequences], [s.cached for s in sequences], sequences)

    @torch.inference_mode()
    def step(self, tokens: Tensor, tables: list[list[int]], owners: list[Sequence]) -> Tensor:
        """The network over one new token a row; see Runner.step."""
        if len(tables) > BUCKETS[-1] or max(map(len, tables)) > self.buffers.room:
            return super().step(tokens, tables, owners)
        self._set_tables(tables, None)
        self._stage(tokens.tolist(), [len(table) for table in tables], owners)
        return self._run(len(tables)).clone()

    def _set_tables(self, tables: list[list[int]], keys: list[TableKey] | None) -> None:
        """Slot tables into their rows; a row that holds the right one already is left alone."""
        for row, table in enumerate(tables):
            key = None if keys is None else keys[row]
            if key is None or self._held[row] != key:
                room = self.buffers.room
                padded = table[:room] + [0] * (room - len(table))  # behind its end: the scratch slot
                self.buffers.tables[row, :room] = torch.tensor(padded, dtype=torch.int32)
                self._held[row] = key
        for row in range(len(tables), self._bucket(len(tables))):
            if self._held[row] != SCRATCH:
                self.buffers.tables[row, 0] = 0
                self._held[row] = SCRATCH

    def _stage(self, tokens: list[int], lengths: list[int], owners: list[Sequence]) -> None:
        """Tokens, lengths and positions in one copy. Rows beyond the batch write to and read from the scratch slot."""
        count, bucket = len(tokens), self._bucket(len(tokens))
        staged = self._staged.numpy()
        staged[:, :bucket] = SCRATCH_STEP
        staged[0, :count], staged[1, :count] = tokens, lengths
        staged[2:, :count] = numpy.array([self._position_rule(owner) for owner in owners]).T
        self.buffers.staged[:, :bucket].copy_(self._staged[:, :bucket], non_blocking=True)

    def _position_rule(self, sequence: Sequence) -> tuple[int, int, int, int]:
        """(base, base, step, step) of both position streams: position = base + step · place of the token."""
        config, context = self.model.config, len(sequence.context_ids)
        if config.position_encoding == "rotary_2d":
            return sequence.mask_place, 1 - context, 0, 1
        if config.answer_positions == "running" and sequence.is_gmask:
            return 0, 0, 1, 0
        return sequence.mask_place, 0, 0, 0

    def _bucket(self, count: int) -> int:
        return next(bucket for bucket in BUCKETS if bucket >= max(count, self.least_rows))

    def _run(self, count: int, *, forget: bool = True) -> Tensor:
        """One decode step over the staged rows. `forget`: a step that ran ahead no longer holds."""
        if forget:
            self._ahead = None
        bucket = self._bucket(count)
        graph = self._graph(bucket) if self.use_graphs else None
        if graph is None:
            self.network.decode(self.buffers, self.cache, bucket, overlap=self.overlap and bucket == 1)
        else:
            graph.replay()
        return self.buffers.logits[:count]

    def _graph(self, bucket: int) -> torch.cuda.CUDAGraph | None:
        """The graph of a bucket, captured on first use; None where that failed."""
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(bucket)
        return self._graphs[bucket]

    def _capture(self, bucket: int) -> torch.cuda.CUDAGraph | None:
        buffers = self.buffers
        inputs = [buffer.clone() for buffer in (buffers.staged, buffers.tables)]
        try:
            stream = torch.cuda.Stream(self.model.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles the kernels, which a capture cannot do
                buffers.tables[:bucket, 0] = 0
                buffers.lengths.fill_(1)
                self.network.decode(buffers, self.cache, bucket, overlap=self.overlap and bucket == 1)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self.network.decode(buffers, self.cache, bucket, overlap=self.overlap and bucket == 1)
            self._pool = graph.pool()
        except RuntimeError as error:
            logger.warning("no CUDA graph for batches of %d (%s); kernels are launched one by one", bucket, error)
            return None
        finally:
            buffers.staged.copy_(inputs[0])
            buffers.tables.copy_(inputs[1])
        return graph


def _key(sequence: Sequence) -> TableKey:
    return sequence.number, id(sequence.slots), len(sequence.slots)


def greedy_samples(logits: Tensor, no_piece: Tensor | None) -> Samples:
    """The best tokens of fp32 logits [batch, vocab], and whether all scores of each row are finite."""
    is_finite = torch.isfinite(logits).all(dim=-1)
    if no_piece is not None:
        logits = logits.masked_fill(no_piece.bool(), -torch.inf)
    both = torch.stack((logits.argmax(dim=-1), is_finite.long())).tolist()
    return Samples(both[0], [bool(flag) for flag in both[1]])
