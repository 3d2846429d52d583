"""Log-probabilities of given answers under a policy: the training forward that ratios and KL are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...model import GLM, Attend, sdpa_attention
from ..loss import hidden_states
from ..samples import Batch, Sample
from .answers import actions_of, one_a_row, sum_by_answer

CHUNK_ELEMENTS = 1 << 26
"""fp32 logits held at once: 256 MB."""


@dataclass(frozen=True)
class ActionScores:
    """What a policy says of the actions of a batch, answer after answer.

    logprobs  fp32 [actions]: log π of the chosen token, with gradient where that is on
    entropy   fp32 [actions]: of the whole distribution, in nats, without gradient
    hidden    [actions, hidden]: the states they were computed from, for a value head on the same trunk
    answer    int64 [actions]: the answer of each, numbered over the batch
    answers   how many answers the batch holds
    """

    logprobs: Tensor
    entropy: Tensor
    hidden: Tensor
    answer: Tensor
    answers: int

    @property
    def sums(self) -> Tensor:
        """Log π of each whole answer, [answers]."""
        return sum_by_answer(self.logprobs, self.answer, self.answers)

    @property
    def lengths(self) -> Tensor:
        """Actions of each answer, fp32 [answers]."""
        return sum_by_answer(torch.ones_like(self.logprobs), self.answer, self.answers)


def score_actions(
    model: GLM, batch: Batch, *, attend: Attend = sdpa_attention, chunk_elements: int = CHUNK_ELEMENTS
) -> ActionScores:
    """Run the policy over context and answer at once; logits are made a chunk at a time and not kept."""
    rows, columns, answer = actions_of(batch)
    hidden = hidden_states(model, batch, attend=attend)[rows, columns]  # [actions, hidden]
    targets = batch.targets[rows, columns]
    most = max(1, chunk_elements // model.config.vocab_size)
    recompute = torch.is_grad_enabled() and len(targets) > most

    def chosen_and_entropy(part: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        scores = model.logits(part).log_softmax(dim=-1)  # fp32 [chunk, vocab]
        with torch.no_grad():
            entropy = -(scores.exp() * scores).sum(dim=-1)
        return scores.gather(1, wanted[:, None])[:, 0], entropy

    logprobs, entropies = [], []
    for part, wanted in zip(hidden.split(most), targets.split(most), strict=True):
        if recompute:
            made = checkpoint(chosen_and_entropy, part, wanted, use_reentrant=False, preserve_rng_state=False)
        else:
            made = chosen_and_entropy(part, wanted)
        logprobs.append(made[0])
        entropies.append(made[1])
    answers = int((batch.document.max(dim=1).values + 1).sum())
    return ActionScores(torch.cat(logprobs), torch.cat(entropies), hidden, answer, answers)


def glm_in(model: nn.Module) -> GLM:
    """The (first) language model inside a module: itself, or what adapters are wrapped around."""
    return next(module for module in model.modules() if isinstance(module, GLM))


def by_tokens(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of samples that run together, in order: rows times the longest stays within `most` tokens."""
    parts: list[list[int]] = []
    longest = 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        if not parts or longest * (len(parts[-1]) + 1) > most:
            parts.append([])
            longest = length
        parts[-1].append(number)
    return parts


@torch.no_grad()
def action_logprobs(
    model: GLM, samples: Sequence[Sample], *, attend: Attend = sdpa_attention, most_tokens: int = 16_384
) -> tuple[Tensor, Tensor]:
    """Log π and entropy of every action of these samples, one sample after the other; fp32 [actions] each."""
    if not samples:
        return torch.empty(0), torch.empty(0)
    parts = [
        score_actions(model, one_a_row(samples[n] for n in numbers).to(model.device), attend=attend)
        for numbers in by_tokens([len(sample) for sample in samples], most_tokens)
    ]
    return torch.cat([part.logprobs for part in parts]), torch.cat([part.entropy for part in parts])
