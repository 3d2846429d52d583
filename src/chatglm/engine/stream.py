"""Stream and Group: one choice of a served request, and the request with all its choices."""

from __future__ import annotations

import itertools
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy

from ..tokenizer import Tokenizer
from ..tokenizer.answer_text import AnswerText
from .block_pool import blocks_for, slots_of
from .sampling import SamplingParams
from .sequence import Sequence

if TYPE_CHECKING:
    from .swapping import SwappedBlocks

_numbers = itertools.count(1 << 40)  # apart from the numbers of plain sequences


class Matcher(Protocol):
    """What a grammar tells about the next token (server.grammar has the real one)."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""
        ...

    def allowed(self) -> numpy.ndarray[Any, numpy.dtype[numpy.bool_]]:
        """Bool [vocab]: tokens that may come next, the end token among them where the text may end."""
        ...

    def take(self, token: int) -> None:
        """Go on with this token. Raises ValueError if the grammar cannot."""
        ...


@dataclass(frozen=True)
class TokenInfo:
    """A sampled token with its log-probability, and the best alternatives as (id, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choices:
    """What the choices of a request have in common beside SamplingParams.

    logit_bias          added to the logits of these ids; -100 bans, 100 forces
    logprobs            None, or how many alternatives are reported with each token
    ignore_eos          never end by the end token
    penalize_repetition 1 is off; counts context and answer (SamplingParams' own counts the answer)
    normalize           the original's post-processing of answers; off under a grammar and for plain completions
    """

    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_eos: bool = False
    penalize_repetition: float = 1.0
    normalize: bool = True


@dataclass(eq=False)
class Stream(Sequence):
    """A Sequence of a served request: choice number, seed of its own, text as it comes, blocks that may be shared.

    newest   when its latest token came
    is_over  whether its end was told
    """

    choice: int = 0
    shared: Choices = field(default_factory=Choices)
    text: AnswerText | None = None
    matcher: Matcher | None = None
    num_sampled: int = 0
    blocks: list[int] = field(default_factory=list)
    turn: int = 0
    is_over: bool = False
    newest: float | None = None
    infos: list[TokenInfo] = field(default_factory=list)

    def uniform(self) -> float:
        """The random number of the next token: a function of (seed, choice, step) alone."""
        key = numpy.array([self.seed & (2**64 - 1), self.choice], dtype=numpy.uint64)
        return float(numpy.random.Generator(numpy.random.Philox(key=key, counter=len(self.generated_ids))).random())

    def hold(self, blocks: list[int]) -> None:
        """Own these blocks from now on. A new number tells runners that keep tables that this one changed."""
        self.blocks = blocks
        self.slots = slots_of(blocks)
        self.number = next(_numbers)

    @property
    def num_tokens(self) -> int:
        """Context, `<sop>` and what was generated."""
        return self.num_prompt_tokens + len(self.generated_ids)


GroupState = Literal["waiting", "prefilling", "running", "finished"]


@dataclass(eq=False)
class Group:
    """A request in the engine: choices over one context. Times are of the monotonic clock, in seconds.

    key      whose request it is; queues are fair between keys
    adapter  of `model: base:adapter`, or None
    front    cache slots that a tuned prefix takes before the context
    swapped  while preempted: its blocks in host memory
    retried  its first pass ran out of memory once
    """

    id: str
    key: str
    streams: list[Stream]
    arrived: float
    adapter: str | None = None
    front: int = 0
    state: GroupState = "waiting"
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0
    spare: list[int] = field(default_factory=list)
    end_code: str | None = None
    swapped: SwappedBlocks | None = None
    retried: bool = False

    @property
    def live(self) -> list[Stream]:
        return [stream for stream in self.streams if not stream.is_finished]

    @property
    def num_prompt_tokens(self) -> int:
        return self.streams[0].num_prompt_tokens

    @property
    def num_computed(self) -> int:
        """Tokens whose work would be lost by a preemption."""
        return sum(stream.cached for stream in self.live)

    @property
    def most_blocks(self) -> int:
        """Blocks of the choices that are left, each at its full length and none shared."""
        return sum(blocks_for(self.front + stream.num_prompt_tokens + stream.max_new) for stream in self.live)

    @property
    def is_fresh(self) -> bool:
        """Nothing was generated yet: one pass over the context serves all choices."""
        return not any(stream.generated_ids for stream in self.streams)


def make_group(
    identity: str,
    key: str,
    prompt_ids: list[int],
    params: SamplingParams,
    tokenizer: Tokenizer,
    *,
    arrived: float,
    max_new: int,
    n: int = 1,
    seed: int | None = None,
    shared: Choices | None = None,
    matchers: list[Matcher] | None = None,
    adapter: str | None = None,
) -> Group:
    """A group from ids that end in `<sop>`. Without a seed one is drawn; choice i uses (seed, i).

    Raises PromptTooLongError for a context that holds no mask.
    """
    shared = shared or Choices()
    seed = secrets.randbits(63) if seed is None else seed
    streams: list[Stream] = []
    for choice in range(n):
        stream = Stream.from_prompt_ids(
            prompt_ids,
            params,
            max_new=max_new,
            sop_id=tokenizer.sop_id,
            gmask_id=tokenizer.gmask_id,
            mask_id=tokenizer.mask_id,
        )
        assert isinstance(stream, Stream)
        stream.choice, stream.shared, stream.seed = choice, shared, seed
        stream.matcher = matchers[choice] if matchers else None
        stream.text = AnswerText(
            tokenizer, params.stop, normalize=shared.normalize, keep_first_blank=stream.matcher is not None
        )
        streams.append(stream)
    return Group(identity, key, streams, arrived, adapter)
