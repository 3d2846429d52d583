"""Programmatic judges: what is wanted of an answer, as a rule that no training can talk into anything.

A judge stands apart from any reward model: where the reward rises and the judge's rate falls, the policy has found a
hole in the reward (training/rlhf/guards.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError

Judge = Callable[[str, str], bool]
"""(prompt, answer) → whether the answer passes."""

SENTENCE_ENDS = ".!?。！？…"
CLOSING = "\"'”’)）」』"


@dataclass(frozen=True)
class FullSentence:
    """The answer has words and ends as a sentence does, in either language."""

    def __call__(self, prompt: str, answer: str) -> bool:
        text = answer.rstrip().rstrip(CLOSING)
        return len(text) > 1 and text[-1] in SENTENCE_ENDS


@dataclass(frozen=True)
class Keyword:
    """The answer holds at least one of `words`, upper or lower case, no more than `most` times in all."""

    words: tuple[str, ...]
    most: int | None = None

    def __call__(self, prompt: str, answer: str) -> bool:
        text = answer.casefold()
        found = sum(text.count(word.casefold()) for word in self.words)
        return found > 0 and (self.most is None or found <= self.most)


@dataclass(frozen=True)
class AtMost:
    """The answer is no longer than `characters`."""

    characters: int

    def __call__(self, prompt: str, answer: str) -> bool:
        return len(answer) <= self.characters


@dataclass(frozen=True)
class Every:
    """All of `judges` agree."""

    judges: tuple[Judge, ...]

    def __call__(self, prompt: str, answer: str) -> bool:
        return all(judge(prompt, answer) for judge in self.judges)


def judge_of(settings: Mapping[str, Any]) -> Judge:
    """A judge from the `judge:` part of a YAML file.

    full_sentence: true · keyword: word or list · keyword_at_most: times · max_characters: number
    Raises RequestError for an unknown key or an empty description.
    """
    known = {"full_sentence", "keyword", "keyword_at_most", "max_characters"}
    if foreign := sorted(set(settings) - known):
        raise RequestError(f"judge: unknown key `{foreign[0]}`", cure=f"known are {', '.join(sorted(known))}")
    judges: list[Judge] = [FullSentence()] if settings.get("full_sentence") else []
    if words := settings.get("keyword"):
        most = settings.get("keyword_at_most")
        judges.append(Keyword((words,) if isinstance(words, str) else tuple(words), most))
    if settings.get("max_characters") is not None:
        judges.append(AtMost(int(settings["max_characters"])))
    if not judges:
        raise RequestError("judge: nothing is asked of an answer", cure="set full_sentence, keyword or max_characters")
    return judges[0] if len(judges) == 1 else Every(tuple(judges))


def judged_rate(judge: Judge, prompts: Sequence[str], answers: Sequence[str]) -> float:
    """Share of answers that pass."""
    return sum(judge(p, a) for p, a in zip(prompts, answers, strict=True)) / max(1, len(answers))


@dataclass(frozen=True)
class WinRate:
    """Counts of a comparison, prompt by prompt; `rate` gives a tie to both halves."""

    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        return (self.wins + self.ties / 2) / max(1, self.wins + self.ties + self.losses)


def win_rate(judge: Judge, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> WinRate:
    """Our answers against theirs: a win where ours alone pass."""
    pairs = [(judge(p, a), judge(p, b)) for p, a, b in zip(prompts, ours, theirs, strict=True)]
    wins, losses = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return WinRate(wins, len(pairs) - wins - losses, losses)
