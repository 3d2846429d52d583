"""Direct preference optimisation: the policy itself is the reward model, r = β · log(π / π_ref).

Source: Rafailov et al. 2023, eq. 7; the SFT term as in RPO (Pang et al. 2024); `by_length` divides each answer's
log-probability by its tokens (Meng et al. 2024), so that a longer answer has no advantage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class PairScores:
    """Sums of log-probabilities of both answers of each pair, [pairs] fp32, and their lengths in tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @classmethod
    def of_answers(cls, logprobs: Tensor, lengths: Tensor) -> PairScores:
        """From the answers of a batch in order chosen, rejected, chosen, …: [2 * pairs] each."""
        return cls(logprobs[0::2], logprobs[1::2], lengths[0::2], lengths[1::2])


def dpo_loss(
    policy: PairScores,
    reference: PairScores,
    *,
    beta: float = 0.1,
    sft: float = 0.0,
    by_length: bool = False,
    smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each pair, [pairs], and what is watched, [pairs] each.

    sft        weight of the chosen answer's own loss a token, against forgetting
    by_length  log-ratios a token instead of an answer
    smoothing  share of labels that are believed to be the wrong way round
    """
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected  # log-ratios
    if by_length:
        chosen, rejected = chosen / policy.chosen_length, rejected / policy.rejected_length
    margin = beta * (chosen - rejected)
    loss = -(1 - smoothing) * functional.logsigmoid(margin) - smoothing * functional.logsigmoid(-margin)
    if sft:
        loss = loss - sft * policy.chosen / policy.chosen_length
    with torch.no_grad():
        watched = {
            "reward_chosen": beta * chosen,
            "reward_rejected": beta * rejected,
            "reward_margin": margin,
            "accuracy": (margin > 0).float(),
            "logprob_chosen": policy.chosen,
            "logprob_rejected": policy.rejected,
        }
    return loss, {name: values.detach() for name, values in watched.items()}
