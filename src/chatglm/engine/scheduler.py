"""Scheduler and Engine: which sequences run next, and the step that runs them.

The simplest right scheduler: first come, first served, a sequence starts when the cache can hold all of it, so
nothing is ever preempted. Sequences join and leave at every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import DeviceError
from .runner import Runner
from .sampler import Sampler, Samples
from .sequence import Sequence
from .speculation import propose

NOT_FINITE = "the scores of this sequence became NaN or infinite (damaged weights, or a dtype that overflows)"

MAX_PREFILL_TOKENS = 8_192
"""Padded tokens of one prefill batch; bounds the memory of its activations."""


@dataclass(frozen=True)
class StepOutput:
    """What one step did to one sequence: its new token (None where the sequence ended without one)."""

    sequence: Sequence
    token: int | None


class Scheduler:
    """Waiting and running sequences over one cache."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises DeviceError if the whole cache could not hold it."""
        needed, capacity = self.runner.slots_needed(sequence), self.runner.cache.capacity
        if needed > capacity:
            raise DeviceError(
                f"the sequence needs {needed} cache tokens, the KV cache holds {capacity}",
                cure="ask for fewer new tokens, or load with a larger `max_cached_tokens`",
            )
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Sequences that may start now, their slots allocated."""
        admitted: list[Sequence] = []
        longest = 0
        while self.waiting:
            sequence = self.waiting[0]
            longest = max(longest, sequence.num_prompt_tokens)
            needed = self.runner.slots_needed(sequence)
            is_full = (len(admitted) + 1) * longest > MAX_PREFILL_TOKENS and admitted
            if is_full or needed > self.runner.cache.num_free_tokens:
                break
            sequence.slots = self.runner.cache.allocate(needed)
            admitted.append(self.waiting.popleft())
        return admitted

    def retire(self, sequence: Sequence) -> None:
        """Give back the slots of a finished sequence."""
        self.runner.cache.release(sequence.slots)
        sequence.slots = []


class Engine:
    """Runs sequences to their end, one token each step."""

    def __init__(self, runner: Runner, sampler: Sampler) -> None:
        self.runner = runner
        self.sampler = sampler
        self.scheduler = Scheduler(runner)

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def step(self) -> list[StepOutput]:
        """Prefill what may start, else decode what runs; drop what was cancelled or ended."""
        scheduler = self.scheduler
        outputs = self._drop_cancelled()
        started = scheduler.admit()
        batch = started or scheduler.running
        if batch:
            try:
                draft = propose(batch[0]) if len(batch) == 1 and not started else []
                if draft:
                    outputs += self._take_drafted(batch[0], draft)
                else:
                    outputs += self._take(self._samples(batch, is_first=bool(started)), batch)
            except BaseException:
                self.abandon([*started, *scheduler.running])
                raise
        scheduler.running = [s for s in dict.fromkeys([*scheduler.running, *started]) if not s.is_finished]
        for sequence in batch:
            if sequence.is_finished:
                scheduler.retire(sequence)
        return outputs

    def run(self, sequences: Iterable[Sequence]) -> None:
        """Run these sequences, and whatever else waits, to the end."""
        for sequence in sequences:
            self.add(sequence)
        while self.has_work:
            self.step()

    def abandon(self, sequences: list[Sequence]) -> None:
        """Take sequences out at once (the caller gave up); their cache slots are free again."""
        scheduler = self.scheduler
        for sequence in dict.fromkeys(sequences):
            sequence.cancel()
            if sequence.slots:
                scheduler.retire(sequence)
        scheduler.running = [s for s in scheduler.running if not s.is_finished]
        scheduler.waiting = deque(s for s in scheduler.waiting if not s.is_finished)

    def _samples(self, batch: list[Sequence], *, is_first: bool) -> Samples:
        """Run the network over a batch and choose a token for each sequence."""
        if is_first:
            return self.sampler(self.runner.prefill(batch), batch)
        return self.runner.decode_and_sample(batch, self.sampler)

    def _take(self, samples: Samples, batch: list[Sequence]) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        for sequence, token, is_finite in zip(batch, samples.tokens, samples.is_finite, strict=True):
            if not is_finite:
                sequence.fail(NOT_FINITE)
                outputs.append(StepOutput(sequence, None))
                continue
            sequence.append(token, self.sampler.end_id)
            outputs.append(StepOutput(sequence, None if sequence.finish_reason == "stop" else token))
        return outputs

    def _take_drafted(self, sequence: Sequence, draft: list[int]) -> list[StepOutput]:
        """Sample one token after another as ever; each that the draft had guessed saves a pass of the network."""
        logits = self.runner.verify(sequence, draft)
        outputs: list[StepOutput] = []
        for row, guess in enumerate([*draft, None]):
            outputs += self._take(self.sampler(logits[row : row + 1], [sequence]), [sequence])
            if sequence.is_finished or outputs[-1].token != guess:
                break
            sequence.cached += 1
        sequence.drafts.record(len(draft), accepted=len(outputs) - 1)
        return outputs

    def _drop_cancelled(self) -> list[StepOutput]:
        """Finished from outside since the last step: cancelled, or a stop string was found."""
        scheduler = self.scheduler
        ended = [s for s in [*scheduler.running, *scheduler.waiting] if s.is_finished]
        for sequence in ended:
            if sequence.slots:
                scheduler.retire(sequence)
        scheduler.running = [s for s in scheduler.running if not s.is_finished]
        scheduler.waiting = deque(s for s in scheduler.waiting if not s.is_finished)
        return [StepOutput(sequence, None) for sequence in ended]
