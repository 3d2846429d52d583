"""Files of preferences, and pairs as samples of one row.

A line is a JSON object with `prompt`, `chosen`, `rejected` and, where there are such, `history` [[question, answer],
…], `system`, `margin`, `source`, `id` (spec/training.md §4.2): what `chatglm data feedback --format pairs` writes.
Both answers of a pair stand in one packed row, so no batch and no process ever holds half a pair.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import ModelConfig
from ...errors import TrainingError
from ...tokenizer import Tokenizer, template
from ..data.preferences import is_held_out, prompt_key
from ..samples import Sample
from .answers import answer_sample, closed_sample

logger = logging.getLogger(__name__)

SHOWN = 3
"""Bad lines told one by one; above that they are a number."""


@dataclass(frozen=True)
class Preference:
    """Of two answers to one prompt, which was preferred. `margin`: by how much the scores should differ at least."""

    prompt: str
    chosen: str
    rejected: str
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    margin: float = 0.0
    source: str = ""

    @property
    def text(self) -> str:
        """The whole prompt as the model reads it."""
        return template.render(self.prompt, self.history, self.system)


@dataclass(frozen=True)
class Pair:
    """Ids of a preference: the context up to `[gMASK]`, and both answers without `<eop>`."""

    context: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float = 0.0
    source: str = ""

    @property
    def length_difference(self) -> int:
        """Tokens by which the chosen answer is longer; negative where it is shorter."""
        return len(self.chosen) - len(self.rejected)


def read_preferences(path: str | Path, *, skip_bad: bool = False) -> list[Preference]:
    """The preferences of a JSONL file.

    Broken lines, missing keys, empty and identical answers, and pairs that contradict another one are told with their
    line and stop the run, or with `skip_bad` are left out and counted in one warning. Exact duplicates are left out.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise TrainingError(
            f"{path}: no such file", cure="`chatglm data feedback --format pairs` writes one"
        ) from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: not UTF-8 (byte {error.start})", cure="store the file as UTF-8") from error
    found: dict[tuple[str, str, str], tuple[int, Preference]] = {}
    problems: list[str] = []
    duplicates = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            preference = _preference(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        key, reverse = _keys(preference)
        if reverse in found:
            problems.append(
                f"{path}:{number}: contradicts line {found[reverse][0]}, where the other answer is preferred"
            )
        elif key in found:
            duplicates += 1
        else:
            found[key] = number, preference
    if problems and not skip_bad:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise TrainingError("\n  ".join(problems[:SHOWN]) + more, cure="mend these lines, or set `skip_bad: true`")
    if problems or duplicates:
        logger.warning("%s: %d bad lines and %d duplicates were left out", path, len(problems), duplicates)
    if not found:
        raise TrainingError(f"{path}: holds no preferences ({len(lines)} lines)")
    return [preference for _, preference in found.values()]


def _preference(line: str) -> Preference:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"a JSON {type(raw).__name__}, not an object")
    texts = {key: raw.get(key) for key in ("prompt", "chosen", "rejected")}
    for key, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"`{key}` is missing or empty")
    if texts["chosen"] == texts["rejected"]:
        raise ValueError("`chosen` and `rejected` are the same text")
    return Preference(
        prompt=str(texts["prompt"]),
        chosen=str(texts["chosen"]),
        rejected=str(texts["rejected"]),
        history=history_of(raw.get("history")),
        system=raw.get("system") or None,
        margin=_margin(raw.get("margin")),
        source=str(raw.get("source") or ""),
    )


def history_of(value: Any) -> tuple[tuple[str, str], ...]:
    """Earlier rounds of a JSON object. Raises ValueError for another form."""
    rounds = value or []
    is_right = isinstance(rounds, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in rounds
    )
    if not is_right:
        raise ValueError("`history` must be a list of [question, answer]")
    return tuple((asked, answered) for asked, answered in rounds)


def _margin(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"`margin` is {value!r}, not a number")
    return float(value)


def _keys(preference: Preference) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    """The pair, and the pair the other way round."""
    text = preference.text
    return (text, preference.chosen, preference.rejected), (text, preference.rejected, preference.chosen)


def split_by_prompt(
    preferences: Iterable[Preference], share: float, seed: int = 0
) -> tuple[list[Preference], list[Preference]]:
    """Training and held-out preferences; all pairs of a prompt fall on one side, by a hash with the seed."""
    train: list[Preference] = []
    held: list[Preference] = []
    for preference in preferences:
        key = prompt_key(preference.prompt, preference.history)
        (held if is_held_out(key, share, seed) else train).append(preference)
    return train, held


def tokenize_pairs(
    preferences: Iterable[Preference], tokenizer: Tokenizer, config: ModelConfig, *, limit: int | None = None
) -> list[Pair]:
    """Ids of each preference. A pair whose context or longer answer does not fit `limit` tokens is left out and told.

    limit  tokens of context, `<sop>`, answer and `<eop>` together; the model's own by default
    """
    limit = min(limit or config.max_sequence_length, config.max_sequence_length)
    pairs, dropped = [], 0
    for preference in preferences:
        context = tokenizer.encode_context(preference.text)[:-1]  # <sop> belongs to the answer here
        chosen, rejected = tokenizer.encode(preference.chosen), tokenizer.encode(preference.rejected)
        if len(context) + 2 + max(len(chosen), len(rejected)) > limit or chosen == rejected:
            dropped += 1
            continue
        pairs.append(Pair(tuple(context), tuple(chosen), tuple(rejected), preference.margin, preference.source))
    if dropped:
        logger.warning("%d pairs of %d do not fit %d tokens and were left out", dropped, dropped + len(pairs), limit)
    return pairs


def balance_lengths(pairs: Sequence[Pair], *, bin_tokens: int = 8, seed: int = 0) -> list[Pair]:
    """Pairs among which length tells nothing: in each bin of |length difference| the longer answer wins as often as
    the shorter one (ChatGLM-RLHF). What is too many is left out at random; pairs of equal length stay.
    """
    bins: dict[int, tuple[list[int], list[int]]] = {}
    kept = [number for number, pair in enumerate(pairs) if pair.length_difference == 0]
    for number, pair in enumerate(pairs):
        if pair.length_difference:
            sides = bins.setdefault(length_bin(pair.length_difference, bin_tokens), ([], []))
            sides[pair.length_difference > 0].append(number)
    for place, (shorter, longer) in sorted(bins.items()):
        count = min(len(shorter), len(longer))
        draw = random.Random(f"{seed} {place}")
        for side in (shorter, longer):
            kept += draw.sample(side, count)
    return [pairs[number] for number in sorted(kept)]


def length_bin(difference: int, bin_tokens: int) -> int:
    """Bin of |difference|: 1 … bin_tokens is 0, the next bin_tokens 1, …."""
    return (max(1, abs(difference)) - 1) // bin_tokens


def reward_row(pair: Pair, config: ModelConfig) -> list[Sample]:
    """Both answers as a reward model reads them, chosen first."""
    return [closed_sample(pair.context, ids, config, source=pair.source) for ids in (pair.chosen, pair.rejected)]


def policy_row(pair: Pair, config: ModelConfig) -> list[Sample]:
    """Both answers as actions of a policy, chosen first."""
    return [answer_sample(pair.context, ids, config, source=pair.source) for ids in (pair.chosen, pair.rejected)]


def sources_of(pairs: Iterable[Pair]) -> dict[str, int]:
    """How many pairs each source gave."""
    return dict(Counter(pair.source for pair in pairs))
