"""From opinions to preference pairs and to examples worth learning.

Evidence that one text is better than another to the same context comes from corrections, from explicit preferences, and
from thumbs and ratings of variants. Where evidence points both ways, nothing is exported and the conflict is reported.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .reading import Row, StoredAnswer

RATING_GAP = 2
"""So much better must a variant be rated than another."""

SOURCES = ("correction", "preferred", "variants")
"""The strongest evidence first; a pair is named after it."""


@dataclass(frozen=True)
class Conflict:
    """Raters who disagree about an answer, or about two."""

    answer_ids: tuple[str, ...]
    raters: tuple[str, ...]
    what: str


@dataclass
class _Evidence:
    context: StoredAnswer
    sources: set[str]
    answer_ids: set[str]
    raters: set[str]
    created: int


def preference_pairs(rows: Sequence[Row], min_rating: int | None = None) -> tuple[list[dict[str, Any]], list[Conflict]]:
    """Lines that the reward model, DPO and PPO read, in the order of their contexts, and what was left out.

    min_rating leaves out a chosen variant that anybody rated lower; corrections are not rated.
    """
    contested, conflicts = _contested(rows)
    low = {row.answer.id for row in rows if min_rating and row.rating is not None and row.rating < min_rating}
    found: dict[tuple[str, str, str], _Evidence] = {}
    for better, text, worse, source, raters in _evidence(rows, contested):
        if text == worse.text or not text.strip() or not worse.text.strip():
            continue
        if source != "correction" and better.id in low:
            continue
        key = context_key(worse), text, worse.text
        entry = found.setdefault(key, _Evidence(worse, set(), set(), set(), worse.created_at))
        entry.sources.add(source)
        entry.answer_ids |= {worse.id} if source == "correction" else {better.id, worse.id}
        entry.raters |= raters
    lines = []
    for (context, chosen, rejected), entry in found.items():
        opposite = found.get((context, rejected, chosen))
        if opposite is None:
            lines.append(_line(chosen, rejected, entry))
        elif chosen < rejected:  # told once
            both = entry.answer_ids | opposite.answer_ids
            raters = entry.raters | opposite.raters
            conflicts.append(Conflict(tuple(sorted(both)), tuple(sorted(raters)), "each preferred over the other"))
    lines.sort(key=lambda line: (line["created"], line["id"]))
    return lines, sorted(conflicts, key=lambda conflict: (conflict.answer_ids, conflict.what))


def corrected_or_liked(
    rows: Sequence[Row], min_rating: int | None = None
) -> tuple[list[dict[str, Any]], list[Conflict]]:
    """Conversations that end with a corrected answer, or with one that was liked.

    With min_rating, answers rated so high count too, and liked ones that anybody rated lower do not. An answer that
    some like and some do not is left out and reported, and so is a correction where raters wrote different ones; a
    corrected answer is never an example itself.
    """
    contested, conflicts = _contested(rows)
    by_answer: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_answer[row.answer.id].append(row)
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for group in by_answer.values():
        answer = group[0].answer
        corrections = sorted({row.correction for row in group if row.correction})
        raters = sorted({row.rater for row in group})
        if len(corrections) > 1:
            conflicts.append(Conflict((answer.id,), tuple(raters), "corrected in different ways"))
            continue
        ratings = [row.rating for row in group if row.rating is not None]
        is_liked = any(row.thumb == 1 for row in group)
        if min_rating is not None and ratings:
            is_liked = min(ratings) >= min_rating
        if corrections:
            text, source = corrections[0], "correction"
        elif is_liked and answer.id not in contested and not any(row.thumb == -1 for row in group):
            text, source = answer.text, "liked"
        else:
            continue
        if text.strip():
            line = {
                "messages": [*answer.messages, {"role": "assistant", "content": text}],
                "source": source,
                "answer_ids": [answer.id],
                "raters": raters,
                "model": answer.model,
                "created": answer.created_at,
            }
            lines.setdefault((context_key(answer), text), line)
    ordered = sorted(lines.values(), key=lambda line: (line["created"], line["answer_ids"]))
    return ordered, sorted(conflicts, key=lambda conflict: (conflict.answer_ids, conflict.what))


def context_key(answer: StoredAnswer) -> str:
    """The same for answers to the same context."""
    return answer.prompt_hash or repr(answer.messages)


def _contested(rows: Sequence[Row]) -> tuple[set[str], list[Conflict]]:
    """Answers with thumbs both up and down."""
    thumbs: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.thumb is not None:
            thumbs[row.answer.id][row.thumb].append(row.rater)
    conflicts = [
        Conflict((identity,), tuple(sorted({*by[1], *by[-1]})), "liked by some, disliked by others")
        for identity, by in thumbs.items()
        if by[1] and by[-1]
    ]
    return {conflict.answer_ids[0] for conflict in conflicts}, conflicts


def _evidence(
    rows: Sequence[Row], contested: set[str]
) -> Iterator[tuple[StoredAnswer, str, StoredAnswer, str, set[str]]]:
    """(better answer, better text, worse answer, source, raters)."""
    contexts: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        contexts[context_key(row.answer)].append(row)
        if row.correction:
            yield row.answer, row.correction, row.answer, "correction", {row.rater}
        if row.worse is not None and context_key(row.answer) == context_key(row.worse):
            yield row.answer, row.answer.text, row.worse, "preferred", {row.rater}
    for group in contexts.values():
        for better in group:
            for worse in group:
                if better.answer.id != worse.answer.id and _is_better(better, worse, contested):
                    raters = {better.rater, worse.rater}
                    yield better.answer, better.answer.text, worse.answer, "variants", raters


def _is_better(better: Row, worse: Row, contested: set[str]) -> bool:
    by_thumb = better.thumb == 1 and worse.thumb == -1
    if by_thumb and not {better.answer.id, worse.answer.id} & contested:
        return True
    return better.rating is not None and worse.rating is not None and better.rating - worse.rating >= RATING_GAP


def _line(chosen: str, rejected: str, entry: _Evidence) -> dict[str, Any]:
    answer = entry.context
    system, history, question = _as_rounds(answer.messages)
    digest = hashlib.sha256("\0".join((context_key(answer), chosen, rejected)).encode()).hexdigest()
    return {
        "id": digest[:32],
        "prompt": question,
        "history": history,
        "system": system,
        "chosen": chosen,
        "rejected": rejected,
        "source": next(source for source in SOURCES if source in entry.sources),
        "messages": answer.messages,
        "answer_ids": sorted(entry.answer_ids),
        "raters": sorted(entry.raters),
        "model": answer.model,
        "sampling": answer.sampling,
        "created": entry.created,
    }


def _as_rounds(messages: list[dict[str, str]]) -> tuple[str | None, list[list[str]], str]:
    """System text, [question, answer] pairs and the last question."""
    system = "\n".join(m["content"] for m in messages if m["role"] in ("system", "developer")) or None
    turns: list[list[str]] = []
    for message in messages:
        if message["role"] in ("system", "developer"):
            continue
        side = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1][0] == side:
            turns[-1][1] += "\n" + message["content"]
        else:
            turns.append([side, message["content"]])
    if turns and turns[0][0] == "assistant":
        turns.insert(0, ["user", ""])
    texts = [text for _, text in turns]
    history = [list(pair) for pair in zip(texts[0:-1:2], texts[1:-1:2], strict=True)]
    return system, history, texts[-1]
