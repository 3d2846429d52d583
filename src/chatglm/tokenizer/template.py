"""The chat template: rounds and a question → the text and ids of a context, fitted into the model's length.

The format is the original's (spec/chatglm-6b.md §5.7): a first question stands bare, later ones in numbered rounds.
A system message, which the model was never trained with, goes before the first kept question.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PromptTooLongError
from .tokenizer import Tokenizer

Round = tuple[str, str]
"""One question and its answer."""

DEFAULT_MAX_NEW_TOKENS = 512


def default_max_new_tokens(max_sequence_length: int) -> int:
    """Tokens kept free for an answer unless told otherwise: 512, or a quarter of a smaller context window."""
    return max(1, min(DEFAULT_MAX_NEW_TOKENS, max_sequence_length // 4))


def render(question: str, rounds: Sequence[Round] = (), system: str | None = None) -> str:
    """The prompt for `question` after earlier `rounds`, oldest first, numbered from 0.

    `system` stands before the first question, on its own line; None and "" mean none.
    """
    questions = [asked for asked, _ in rounds] + [question]
    if system:
        questions[0] = f"{system}\n{questions[0]}"
    if not rounds:
        return questions[0]
    answers = [answered for _, answered in rounds] + [""]
    frames = [
        f"[Round {number}]\n问：{asked}\n答：{answered}"
        for number, (asked, answered) in enumerate(zip(questions, answers, strict=True))
    ]
    return "\n".join(frames)


@dataclass(frozen=True)
class Fitted:
    """A context that leaves room for the answer.

    prompt          the rendered text
    ids             its ids, `[gMASK]` and `<sop>` at the end
    dropped_rounds  how many of the oldest rounds were left out
    max_new_tokens  room that was reserved for the answer
    """

    prompt: str
    ids: list[int]
    dropped_rounds: int
    max_new_tokens: int


def fit(
    tokenizer: Tokenizer,
    question: str,
    rounds: Sequence[Round] = (),
    *,
    system: str | None = None,
    limit: int,
    max_new_tokens: int | None = None,
) -> Fitted:
    """The context of a question with as many of the latest whole rounds as fit.

    limit           tokens that context and answer may have together (`max_sequence_length`)
    max_new_tokens  room reserved for the answer first; None: `default_max_new_tokens(limit)`
    Raises PromptTooLongError, with the numbers, when the question and system message alone do not fit.
    """
    reserved = default_max_new_tokens(limit) if max_new_tokens is None else max_new_tokens
    contexts: dict[int, tuple[str, list[int]]] = {}

    def fits(dropped: int) -> bool:
        prompt = render(question, rounds[dropped:], system)
        contexts[dropped] = prompt, tokenizer.encode_context(prompt)
        return len(contexts[dropped][1]) + reserved <= limit

    # A context only gets shorter as rounds are dropped, so a long history costs a few encodings, not one per round.
    dropped = 0 if fits(0) else bisect_left(range(len(rounds)), True, key=fits)
    if dropped == len(rounds) and not fits(dropped):
        length = len(contexts[dropped][1])
        what = "the question with the system message" if system else "the question"
        raise PromptTooLongError(
            f"{what} has {length:,} tokens, the model holds {limit:,}, {reserved:,} are reserved for the answer: "
            f"{length + reserved - limit:,} too many",
            cure="shorten the question, or lower max_new_tokens",
        )
    prompt, ids = contexts[dropped]
    return Fitted(prompt, ids, dropped, reserved)
