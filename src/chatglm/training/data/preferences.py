"""Judged answers: what makes a set of preferences unfit to train on, and what it is like (spec/training.md §4.2).

Answers to one prompt are the nodes of a graph, each pair an edge from the better to the worse: an edge both ways is a
contradiction, a longer way round a cycle. Sets are split by prompt, never by pair.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .formats import Preference
from .problems import Problem


@dataclass(frozen=True)
class Judged:
    """A judged answer or pair and where it stands."""

    record: Preference
    file: str
    line: int

    @property
    def prompt_key(self) -> str:
        """What is asked: the history and the question."""
        return prompt_key(self.record.prompt, self.record.history)

    def problem(self, kind: str, message: str) -> Problem:
        return Problem(kind, self.file, self.line, message)


def prompt_key(prompt: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """One string for a question and what was said before it; blanks around texts do not count."""
    return json.dumps([[part.strip() for pair in history for part in pair], prompt.strip()], ensure_ascii=False)


def is_held_out(key: str, share: float, seed: int = 0) -> bool:
    """Whether a prompt belongs to the held-out part: the same for all of its pairs, in every file and run."""
    drawn = hashlib.blake2b(f"{seed}\x00{key}".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(drawn, "big") < share * 2**64


def find_problems(judged: Sequence[Judged], evaluation: frozenset[str] = frozenset()) -> Iterator[Problem]:
    """Everything that is wrong with a set, record by record, then prompt by prompt.

    evaluation  keys of prompts that the model will be judged on
    """
    seen: dict[tuple[str, str, str, int | None], Judged] = {}
    by_prompt: dict[str, list[Judged]] = defaultdict(list)
    for found in judged:
        record = found.record
        if record.score is None:
            yield from _of_pair(found)
        key = (found.prompt_key, record.chosen.strip(), record.rejected.strip(), record.score)
        if key in seen:
            earlier = seen[key]
            yield found.problem("duplicate", f"is the same as {earlier.file}, line {earlier.line}")
            continue
        seen[key] = found
        by_prompt[found.prompt_key].append(found)
        if found.prompt_key in evaluation:
            yield found.problem("leakage", "its prompt is in the evaluation set")
    for group in by_prompt.values():
        yield from _contradictions(group)
        yield from _cycles(group)


def _of_pair(found: Judged) -> Iterator[Problem]:
    record = found.record
    if not record.rejected.strip():
        yield found.problem("empty", "the rejected answer is blank")
    if record.chosen.strip() == record.rejected.strip():
        yield found.problem("identical", "the preferred answer is the rejected one")
    if record.margin == 0:
        yield found.problem("tie", "the margin is 0: neither answer is preferred")
    elif record.margin is not None and record.margin < 0:
        yield found.problem("contradiction", f"the margin is {record.margin:g}: the rejected answer is the better one")


def _edges(group: Sequence[Judged]) -> dict[tuple[str, str], Judged]:
    edges: dict[tuple[str, str], Judged] = {}
    for found in group:
        better, worse = found.record.chosen.strip(), found.record.rejected.strip()
        if found.record.score is None and better != worse:
            edges.setdefault((better, worse), found)
    return edges


def _contradictions(group: Sequence[Judged]) -> Iterator[Problem]:
    edges = _edges(group)
    for (better, worse), found in edges.items():
        other = edges.get((worse, better))
        if other is not None and (other.file, other.line) < (found.file, found.line):
            yield found.problem("contradiction", f"prefers what {other.file}, line {other.line} rejects")
    scores: dict[str, Judged] = {}
    for found in group:
        if found.record.score is not None:
            earlier = scores.setdefault(found.record.chosen.strip(), found)
            if earlier.record.score != found.record.score:
                where = f"{earlier.file}, line {earlier.line}"
                yield found.problem("contradiction", f"scores {found.record.score:+d} what {where} scores otherwise")


def _cycles(group: Sequence[Judged]) -> Iterator[Problem]:
    """One problem for each ring of three or more answers, at its last record."""
    edges = _edges(group)
    follows: dict[str, list[str]] = defaultdict(list)
    for better, worse in edges:
        if (worse, better) not in edges:
            follows[better].append(worse)
    for ring in _rings(follows):
        members = set(ring)
        inside = [found for (better, worse), found in edges.items() if better in members and worse in members]
        last = max(inside, key=lambda found: (found.file, found.line))
        lines = ", ".join(str(found.line) for found in sorted(inside, key=lambda found: (found.file, found.line))[:6])
        yield last.problem("cycle", f"{len(ring)} answers are preferred in a circle (lines {lines})")


def _rings(follows: dict[str, list[str]]) -> Iterator[list[str]]:
    """Strongly connected parts with more than one node (Tarjan's algorithm, without recursion)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    for root in list(follows):
        if root in number:
            continue
        work: list[tuple[str, Iterator[str]]] = [(root, iter(follows.get(root, ())))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            following = next(rest, None)
            if following is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    ring = []
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        ring.append(member)
                        if member == node:
                            break
                    if len(ring) > 1:
                        yield ring
            elif following not in number:
                number[following] = low[following] = len(number)
                stack.append(following)
                on_stack.add(following)
                work.append((following, iter(follows.get(following, ()))))
            elif following in on_stack:
                low[node] = min(low[node], number[following])


def described(judged: Sequence[Judged]) -> dict[str, Any]:
    """Counts, sources, languages and lengths; `longer_wins` is the share of pairs whose longer answer is preferred.

    A reward model that learns from pairs in which the longer answer nearly always wins learns length.
    """
    pairs = [found.record for found in judged if found.record.score is None]
    thumbs = [found.record for found in judged if found.record.score is not None]
    unequal = [pair for pair in pairs if len(pair.chosen) != len(pair.rejected)]
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in unequal)
    return {
        "pairs": len(pairs),
        "thumbs_up": sum(record.score == 1 for record in thumbs),
        "thumbs_down": sum(record.score == -1 for record in thumbs),
        "prompts": len({found.prompt_key for found in judged}),
        "sources": dict(Counter(found.record.source or "-" for found in judged)),
        "languages": dict(Counter(language(found.record.prompt) for found in judged)),
        "chosen_characters": _mean(len(pair.chosen) for pair in pairs),
        "rejected_characters": _mean(len(pair.rejected) for pair in pairs),
        "longer_wins": round(longer / len(unequal), 3) if unequal else None,
    }


def language(text: str) -> str:
    """`zh` where every fifth character is Chinese, `en` where most letters are Latin, else `other`."""
    letters = [character for character in text if character.isalpha()]
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in letters)
    if letters and chinese >= 0.2 * len(letters):
        return "zh"
    return "en" if sum(character.isascii() for character in letters) > 0.5 * len(letters) else "other"


def _mean(values: Iterable[int]) -> float | None:
    found = list(values)
    return round(sum(found) / len(found), 1) if found else None
