"""Answers of the policy as it is now, sampled by the project's own engine: batched, cached, temperature 1.

The engine reads the very parameters that are trained, so a step of the optimiser is a step of the engine; or, with a
`dtype` of its own, a copy in that dtype that is filled anew before every round. Log-probabilities for the loss are
computed again in the training forward; those of the engine are kept only to compare the two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ...config import ModelConfig
from ...engine.graph_runner import make_runner
from ...engine.kv_cache import BLOCK_SIZE, KVCache
from ...engine.sampler import Sampler, Samples
from ...engine.sampling import SamplingParams
from ...engine.scheduler import Engine, Scheduler
from ...engine.sequence import Sequence as Stream
from ...errors import TrainingError
from ...model import GLM
from ...tokenizer import Tokenizer, template
from ..samples import Sample
from .answers import answer_sample
from .copying import copy_of

GREEDY = SamplingParams(temperature=0, seed=0)
DRAWN = SamplingParams(temperature=1, top_k=0, top_p=1, seed=0)


@dataclass(frozen=True)
class Prompt:
    """What is answered: the text, its ids up to `[gMASK]`, and an answer to be measured against where there is one."""

    text: str
    context: tuple[int, ...]
    reference: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    ids          without `<eop>`
    is_finished  ended by itself; otherwise the token limit did
    logprobs     log π of each action as the engine saw it, `<eop>` among them; empty for greedy answers
    """

    prompt: Prompt
    ids: tuple[int, ...]
    is_finished: bool
    text: str
    logprobs: tuple[float, ...] = ()

    def sample(self, config: ModelConfig) -> Sample:
        """As actions for the training forward."""
        return answer_sample(
            self.prompt.context, self.ids, config, is_finished=self.is_finished, source=self.prompt.source
        )


def make_prompt(
    tokenizer: Tokenizer,
    question: str,
    history: Sequence[tuple[str, str]] = (),
    *,
    reference: str | None = None,
    source: str = "",
) -> Prompt:
    """A prompt in the chat template."""
    text = template.render(question, history)
    return Prompt(text, tuple(tokenizer.encode_context(text)[:-1]), reference, source)


class PolicySampler(Sampler):
    """Draws from the policy itself: the plain softmax, nothing banned, and remembers log π of what it drew."""

    def __init__(self, end_id: int) -> None:
        super().__init__(None, end_id)
        self.logprobs: dict[int, list[float]] = {}
        self._draws: dict[int, list[float]] = {}

    def _uniform(self, sequence: Stream) -> float:
        """The random number of a stream's next token; all of them are drawn at once, from its seed."""
        if sequence.number not in self._draws:
            generator = np.random.Generator(np.random.Philox(key=sequence.seed))
            self._draws[sequence.number] = generator.random(sequence.max_new).tolist()
        return self._draws[sequence.number][len(sequence.generated_ids)]

    def finish(self, sequence: Stream) -> tuple[float, ...]:
        """Log π of a stream's actions; what was kept of it is let go."""
        self._draws.pop(sequence.number, None)
        return tuple(self.logprobs.pop(sequence.number, ()))

    @torch.inference_mode()
    def __call__(self, logits: Tensor, sequences: list[Stream]) -> Samples:
        """logits: fp32 [batch, vocab]."""
        if all(sequence.params.is_greedy for sequence in sequences):
            return super().__call__(logits, sequences)
        is_finite = torch.isfinite(logits).all(dim=-1)
        scores = torch.where(is_finite[:, None], logits, 0.0).log_softmax(dim=-1)
        draws = torch.tensor([[self._uniform(sequence)] for sequence in sequences], dtype=torch.float64)
        tokens = places_of(scores, draws.to(logits.device))
        found = torch.cat((tokens.double(), is_finite[:, None].double(), scores.gather(1, tokens).double()), dim=1).T
        ids, flags, chosen = found.tolist()  # one transfer to the host
        for sequence, logprob in zip(sequences, chosen, strict=True):
            self.logprobs.setdefault(sequence.number, []).append(logprob)
        return Samples([int(token) for token in ids], [bool(flag) for flag in flags])


ALMOST_1 = 1 - 2**-52

BLOCK = 512
"""Neighbouring tokens whose probabilities are summed first: sums of blocks run side by side, one long one does not."""


def places_of(scores: Tensor, uniform: Tensor) -> Tensor:
    """The token that each random number falls on, int64 [batch, 1], by the inverse of the cumulative distribution.

    scores  fp32 [batch, vocab]: log-probabilities; uniform: fp64 [batch, 1], in [0, 1)
    """
    vocab = scores.shape[-1]
    shares = nn.functional.pad(scores, (0, -vocab % BLOCK), value=-torch.inf).unflatten(-1, (-1, BLOCK)).double().exp()
    ends = shares.sum(dim=-1).cumsum(dim=-1)  # [batch, blocks]
    threshold = uniform * ALMOST_1 * ends[:, -1:]
    block = torch.searchsorted(ends, threshold, right=True).clamp(max=ends.shape[-1] - 1)
    before = nn.functional.pad(ends, (1, 0)).gather(1, block)
    inside = shares.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(dim=-1)  # [batch, BLOCK]
    within = torch.minimum(threshold - before, inside[:, -1:] * ALMOST_1)  # the sums of both ways round differently
    place = torch.searchsorted(inside, within, right=True).clamp(max=BLOCK - 1)
    return (block * BLOCK + place).clamp(max=vocab - 1)


class InLots(Scheduler):
    """Lets streams begin in lots: a first pass for each one that ends would hold up all others every time."""

    def admit(self) -> list[Stream]:
        """Streams that may start, once a quarter of the cache is free."""
        cache = self.runner.cache
        return super().admit() if not self.running or 4 * cache.num_free_tokens >= cache.capacity else []


@dataclass
class RolloutRate:
    """Tokens that the engine made, and the seconds it took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class RolloutEngine:
    """Samples answers of `model`, whose weights may change between calls.

    batch    answers that run at once; max_new: token limit of an answer
    kernels  as for engine.graph_runner.make_runner
    dtype    of the engine's own copy of the weights; None: it shares those of `model`
    """

    model: GLM
    tokenizer: Tokenizer
    max_new: int
    batch: int = 64
    kernels: str | None = None
    dtype: torch.dtype | None = None
    rate: RolloutRate = field(default_factory=RolloutRate)
    _engine: Engine | None = None
    _capacity: int = 0
    _twin: GLM | None = None

    def sample(self, prompts: Sequence[Prompt], *, each: int = 1, seed: int = 0, first: int = 0) -> list[Answer]:
        """`each` answers for every prompt, one prompt's together, drawn from the policy's own distribution.

        first  place of the first answer among those that all processes draw with this seed
        An answer depends on the weights, its place and the seed alone, never on how the batch was cut.
        """
        asked = [prompt for prompt in prompts for _ in range(each)]
        return self._run(asked, DRAWN, [self._seed(seed, first + number) for number in range(len(asked))])

    def greedy(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The most likely answer of each prompt, for evaluations and canaries."""
        return self._run(prompts, GREEDY, [0] * len(prompts))

    def _seed(self, seed: int, number: int) -> int:
        return (seed * 1_000_003 + number) % (2**63 - 1)

    def _run(self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]) -> list[Answer]:
        if not prompts:
            return []
        was_training = self.model.training
        self.model.eval()
        streams = [self._stream(prompt, params, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        engine = self._prepared(streams)
        sampler = engine.sampler
        assert isinstance(sampler, PolicySampler)
        started = time.perf_counter()
        engine.run(streams)  # the cache holds `batch` of them: as one ends, the next begins
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.rate.seconds += time.perf_counter() - started
        self.model.train(was_training)
        answers = []
        for prompt, stream in zip(prompts, streams, strict=True):
            if stream.finish_reason == "error":
                raise TrainingError(f"a roll-out failed: {stream.error}", cure="lower the learning rate or raise beta")
            self.rate.tokens += len(stream.generated_ids) + (stream.finish_reason == "stop")
            answers.append(
                Answer(
                    prompt,
                    tuple(stream.generated_ids),
                    stream.finish_reason == "stop",
                    self.tokenizer.decode(stream.generated_ids),
                    sampler.finish(stream),
                )
            )
        return answers

    def _stream(self, prompt: Prompt, params: SamplingParams, seed: int) -> Stream:
        config = self.model.config
        room = config.max_sequence_length - len(prompt.context) - 1
        if room < 1:
            raise TrainingError(
                f"a prompt has {len(prompt.context)} tokens, the model holds {config.max_sequence_length}: "
                f"{prompt.text[:40]!r}"
            )
        context = list(prompt.context)
        stream = Stream(context, config.bos_token_id, len(context) - 1, True, min(self.max_new, room), params)
        stream.seed = seed
        return stream

    def _prepared(self, streams: Sequence[Stream]) -> Engine:
        """The engine, made anew where the cache is too small for these streams or `refresh` was called."""
        prefix = self.model.config.pre_seq_len or 0
        longest = max((prefix + s.num_prompt_tokens + s.max_new for s in streams), default=1)
        needed = min(self.batch, len(streams)) * -(-longest // BLOCK_SIZE) * BLOCK_SIZE
        model = self._current()
        holds_copies = model.dtype != torch.float32  # of norms and biases, beside narrow weights
        if self._engine is None or needed > self._capacity or holds_copies:
            self._capacity = max(needed, self._capacity)
            cache = KVCache(model.config, self._capacity, model.dtype, model.device)
            runner = make_runner(model, cache, kernels=self.kernels)
            self._engine = Engine(runner, PolicySampler(model.config.eos_token_id))
            self._engine.scheduler = InLots(runner)
        return self._engine

    @torch.no_grad()
    def _current(self) -> GLM:
        """The model that the engine runs, with the weights of this moment."""
        if self.dtype is None:
            return self.model
        if self._twin is None:
            self._twin = copy_of(self.model).to(self.dtype).eval().requires_grad_(False)
            self._twin.tie_head()
        for mine, theirs in zip(self._twin.parameters(), self.model.parameters(), strict=True):
            mine.copy_(theirs)
        return self._twin
