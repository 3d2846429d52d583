"""How well a model predicts given text: nats of every scored token, its best guess, its distance from a reference.

What is scored: the tokens of Example.answer_ids, `<eop>` of a dialogue included, each from the context (which sees all
of itself) and the answer tokens before it. Nothing of the context is scored. Logits are fp32, sums are fp64. Rows are
batched by length in one fixed order, so a repeated run on the same machine gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..model import GLM, sdpa_attention
from ..model.batch import by_length, left_padded
from ..tokenizer.examples import Example

BATCH_TOKENS = 4_096
"""Tokens of a batch, padding counted."""

LOGITS_ELEMENTS = 1 << 24
"""Scores held at once: 64 MB of fp32."""

Count = Callable[[int], None]
"""Called with the number of tokens that were just scored."""


@dataclass(frozen=True)
class Score:
    """What a model makes of some examples; tensors in the order of the examples and their tokens.

    nats        float64 [tokens]: negative log-likelihood
    best        int32 [tokens]: the most likely id
    bytes       UTF-8 bytes that the tokens spell
    divergence  float64 [tokens]: nats from the reference's distribution to this one's, or None without a reference
    """

    nats: Tensor
    best: Tensor
    bytes: int
    divergence: Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.nats)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Does not depend on the tokenizer: a smaller vocabulary has more tokens and easier ones."""
        return float(self.nats.sum()) / math.log(2) / self.bytes

    def agreement(self, other: Score) -> float:
        """Share of places where both have the same best id: equal next tokens under teacher forcing."""
        return float((self.best == other.best).double().mean())


@dataclass(frozen=True)
class Reference:
    """What is kept of a reference model so that others can be compared with it after it is gone.

    hidden  fp32 [tokens, hidden] for each example, on the CPU
    head    fp32 [vocab, hidden]
    """

    hidden: list[Tensor]
    head: Tensor

    def logits(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Hidden states of some examples, moved to where they are compared."""
        return torch.cat([self.hidden[number] for number in numbers]).to(device)


@torch.inference_mode()
def score(
    model: GLM, examples: Sequence[Example], *, reference: Reference | None = None, count: Count | None = None
) -> Score:
    """Score examples, which must not be empty, beside a reference of the same examples where one is given."""
    nats, best, divergence = ([torch.empty(0)] * len(examples) for _ in range(3))
    for numbers in by_length([len(example) for example in examples], BATCH_TOKENS):
        rows = [examples[number] for number in numbers]
        hidden = answer_hidden(model, rows)
        answers = torch.tensor([token for row in rows for token in row.answer_ids], device=model.device)
        expected = None if reference is None else reference.logits(numbers, model.device)
        parts = _compare(model, hidden, answers, reference, expected)
        lengths = [len(row.answer_ids) for row in rows]
        for held, values in zip((nats, best, divergence), parts, strict=True):
            for number, piece in zip(numbers, values.cpu().split(lengths), strict=True):
                held[number] = piece
        if count is not None:
            count(len(answers))
    return Score(
        torch.cat(nats),
        torch.cat(best),
        sum(example.num_bytes for example in examples),
        None if reference is None else torch.cat(divergence),
    )


@torch.inference_mode()
def make_reference(model: GLM, examples: Sequence[Example]) -> Reference:
    """Run a plain (not quantised) model once and keep what `score` compares with."""
    held: list[Tensor] = [torch.empty(0)] * len(examples)
    for numbers in by_length([len(example) for example in examples], BATCH_TOKENS):
        rows = [examples[number] for number in numbers]
        pieces = answer_hidden(model, rows).float().cpu().split([len(row.answer_ids) for row in rows])
        for number, piece in zip(numbers, pieces, strict=True):
            held[number] = piece.clone()
    return Reference(held, model.lm_head.weight.detach().float().cpu())


def answer_hidden(model: GLM, rows: Sequence[Example]) -> Tensor:
    """Hidden states [answer tokens of all rows, hidden] from which each answer token is predicted."""
    answers = [row.answer_ids[:-1] for row in rows]  # nothing is predicted from the last one
    ids, positions, blocked = left_padded([row.context_ids for row in rows], answers, model.config, model.device)
    hidden = model.transformer(ids, positions, blocked, attend=sdpa_attention)
    total = ids.shape[1]
    return torch.cat([hidden[k, total - len(row.answer_ids) :] for k, row in enumerate(rows)])


def _compare(
    model: GLM, hidden: Tensor, answers: Tensor, reference: Reference | None, expected: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Nats, best id and divergence of each answer token, some rows of logits at a time."""
    head = None if reference is None else reference.head.to(model.device)
    nats, best, divergence = [], [], []
    step = max(1, LOGITS_ELEMENTS // model.config.vocab_size)
    for start in range(0, len(answers), step):
        part = slice(start, start + step)
        scores = model.logits(hidden[part]).log_softmax(dim=-1)  # fp32 [tokens, vocab]
        nats.append(-scores.gather(1, answers[part, None])[:, 0].double())
        best.append(scores.argmax(dim=-1).int())
        if head is None or expected is None:
            divergence.append(torch.zeros(len(scores)))
        else:
            true = functional.linear(expected[part], head).log_softmax(dim=-1)
            divergence.append(functional.kl_div(scores, true, reduction="none", log_target=True).double().sum(dim=-1))
    return torch.cat(nats), torch.cat(best), torch.cat(divergence)
