"""What is wrong with training data: found with file and line, counted by kind, and stopping a run unless allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from chatglm.errors import TrainingError

KINDS: dict[str, str] = {
    "json": "a line that is no JSON object",
    "encoding": "bytes of another encoding, or characters that an earlier conversion lost",
    "keys": "an object of no known format, or fields of the wrong type",
    "roles": "a dialogue whose sides do not take turns",
    "empty": "a blank question, answer or text",
    "long": "an answer, or a question with its answer, longer than the context",
    "duplicate": "the same text or dialogue again",
    "contradiction": "the same question with another answer, or a pair judged both ways",
    "identical": "a preferred answer equal to the rejected one",
    "tie": "a pair without a preference",
    "cycle": "preferences that run in a circle",
    "leakage": "a prompt that is also in the evaluation set",
}
"""Kind and what it means. Allowed, a record with a problem is left out; a contradiction is kept."""

SHOWN = 5
"""Problems of a kind that are kept before the rest is only counted."""
LISTED = 3
"""Problems in the message of an error."""


@dataclass(frozen=True)
class Problem:
    """One finding. `line` counts from 1; 0 is the file as a whole."""

    kind: str
    file: str
    line: int
    message: str

    def __str__(self) -> str:
        place = f"{self.file}, line {self.line}" if self.line else self.file
        return f"{place}: {self.message} [{self.kind}]"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Allowance:
    """How many problems of each kind may be passed over: a number, or a share of the records."""

    limits: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, words: Iterable[str]) -> Allowance:
        """From `duplicate`, `duplicate=20`, `duplicate=1%`, `all`. Raises TrainingError for an unknown kind."""
        limits: dict[str, float] = {}
        for word in words:
            kind, _, amount = word.partition("=")
            kinds = list(KINDS) if kind == "all" else [kind]
            if kinds[0] not in KINDS:
                raise TrainingError(
                    f"--allow {word}: there is no kind of problem called `{kind}`",
                    cure=f"known: all, {', '.join(KINDS)}",
                )
            limits |= dict.fromkeys(kinds, _amount(word, amount))
        return cls(limits)

    def is_exceeded(self, kind: str, count: int, records: int) -> bool:
        """Whether so many are too many. A share, written as less than 1, is of `records`."""
        limit = self.limits.get(kind, 0)
        return count > (limit * max(records, 1) if 0 < limit < 1 else limit)


def _amount(word: str, amount: str) -> float:
    if not amount:
        return float("inf")
    try:
        value = float(amount.removesuffix("%")) / (100 if amount.endswith("%") else 1)
    except ValueError:
        value = -1
    if value < 0 or (value >= 1 and amount.endswith("%") and value > 1):
        raise TrainingError(f"--allow {word}: `{amount}` is no number and no share", cure="write `20` or `1%`")
    return value if not (amount.endswith("%") and value == 1) else float("inf")


class Findings:
    """Problems by kind: all counted, the first few kept."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.shown: list[Problem] = []

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.counts[problem.kind] += 1
            if self.counts[problem.kind] <= SHOWN:
                self.shown.append(problem)

    def stopping(self, allowance: Allowance, records: int) -> list[str]:
        """Kinds that are over their limit. Shares count when all records are known (`records` > 0)."""
        return [
            kind
            for kind, count in self.counts.items()
            if (records or not 0 < allowance.limits.get(kind, 0) < 1) and allowance.is_exceeded(kind, count, records)
        ]

    def raise_if_stopping(self, allowance: Allowance, records: int = 0) -> None:
        """Raises TrainingError with the first problems of the kinds that are over their limit."""
        kinds = self.stopping(allowance, records)
        if not kinds:
            return
        lines = [str(problem) for problem in self.shown if problem.kind in kinds][:LISTED]
        counted = ", ".join(f"{self.counts[kind]:,} {kind}" for kind in kinds)
        raise TrainingError(
            f"{lines[0]}" + "".join(f"\n  {line}" for line in lines[1:]) + f"\n  so far: {counted}",
            cure=f"correct the data (`chatglm data check` lists everything), or pass over such records: "
            f"{' '.join(f'--allow {kind}' for kind in kinds)}",
        )

    def as_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "first": [problem.as_dict() for problem in self.shown]}
