"""SamplingParams: how one sequence chooses its tokens. No torch here, so a command line can validate at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """Validated settings of one sequence. The defaults are the model card's (its hidden `top_k=50` is named here).

    temperature           0 … 100; 0 is greedy, no random number is drawn
    top_k                 keep the k best tokens; 0 keeps all
    top_p                 keep the smallest set of best tokens with at least this probability
    min_p                 drop tokens below this share of the best token's probability
    repetition_penalty    > 0; divides positive (multiplies negative) logits of tokens already generated
    presence_penalty      -2 … 2; taken once from tokens already generated
    frequency_penalty     -2 … 2; taken for each time a token was generated
    penalize_context      let the three penalties and the n-gram rule also count the context
    no_repeat_ngram_size  no n-gram of this length twice in the answer; 0 is off
    stop                  the answer ends before the first of these strings, wherever token borders lie
    seed                  same seed, same answer; None draws one and reports it
    max_new_tokens        longest answer in tokens; None: `template.default_max_new_tokens` (512, less where the context
                          is smaller)
    max_length            the original's limit: context and answer together; at least one token is made
    min_new_tokens        no end before this many tokens
    num_beams             beam search with this width (temperature is then not used)
    length_penalty        exponent of the length that divides a beam's score
    early_stopping        end a beam search as soon as `num_beams` answers are complete
    prompt_lookup         guess up to this many tokens ahead from earlier text and verify them in one step; the answer
                          is the same, sooner where text repeats (0 is off; acts while one sequence runs)

    Raises RequestError naming the field, its value and the allowed range.
    """

    temperature: float = 0.95
    top_k: int = 50
    top_p: float = 0.7
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalize_context: bool = False
    no_repeat_ngram_size: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, (low, high, whole) in _RANGES.items():
            _check_number(name, getattr(self, name), low, high, whole)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop is {self.stop!r}; it must be a list of strings that are not empty")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
        if self.num_beams > 1 and self.stop:
            raise RequestError("stop strings and num_beams > 1 exclude each other")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> SamplingParams:
        """From keyword arguments. An unknown name is refused, with the nearest known one."""
        known = {field.name for field in fields(cls)}
        for name in settings:
            if name not in known:
                near = _ALIASES.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
                raise RequestError(f"unknown setting `{name}`" + (f"; did you mean `{near}`?" if near else ""))
        return cls(**settings)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether any logit depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


MAX_STOP_STRINGS = 16

_RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 100, False),
    "top_k": (0, 1_000_000, True),
    "top_p": (0, 1, False),
    "min_p": (0, 1, False),
    "repetition_penalty": (0.01, 100, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "no_repeat_ngram_size": (0, 1_000, True),
    "seed": (0, 2**63 - 1, True),
    "max_new_tokens": (1, 1_000_000, True),
    "max_length": (1, 1_000_000, True),
    "min_new_tokens": (0, 1_000_000, True),
    "num_beams": (1, 64, True),
    "prompt_lookup": (0, 64, True),
    "length_penalty": (-10, 10, False),
}

_OPTIONAL = frozenset({"seed", "max_new_tokens", "max_length"})

_ALIASES = {
    "do_sample": "temperature=0",
    "max_tokens": "max_new_tokens",
    "n_beams": "num_beams",
    "stop_strings": "stop",
    "history": "history (an argument of chat)",
}


def _check_number(name: str, value: object, low: float, high: float, whole: bool) -> None:
    if value is None and name in _OPTIONAL:
        return
    kind = "a whole number" if whole else "a number"
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        raise RequestError(f"{name} is {value!r}; it must be {kind} from {low:g} to {high:g}")
