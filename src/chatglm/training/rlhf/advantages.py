"""How much better an answer, or a token of it, was than expected.

PPO: generalised advantage estimation over the tokens of each answer (Schulman et al. 2015, eq. 16). RLOO and GRPO:
the other answers to the same prompt are the baseline (Ahmadian et al. 2024; Shao et al. 2024). All tensors fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1e-6
"""Keeps a division by a spread of zero finite."""


def token_rewards(scores: Tensor, log_ratio: Tensor, answer: Tensor, beta: float) -> Tensor:
    """Reward of each action, [actions]: -β · log(π / π_ref), and at an answer's last action also its score.

    scores     [answers]  what the reward model, less the baseline, gave
    log_ratio  [actions]  log π - log π_ref of the chosen tokens
    answer     [actions]  int64, which answer an action belongs to; answers lie one after the other
    """
    rewards = -beta * log_ratio
    last = torch.ones_like(answer, dtype=torch.bool)
    last[:-1] = answer[:-1] != answer[1:]
    return rewards + torch.where(last, scores[answer], 0.0)


def gae(
    rewards: Tensor, values: Tensor, answer: Tensor, *, gamma: float = 1.0, decay: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (the value's targets), [actions] each.

    rewards, values, answer  [actions]; an answer ends with its last action, nothing is bootstrapped behind it
    decay                    λ: 0 trusts the value alone, 1 the rewards alone
    """
    advantages = torch.empty_like(rewards)
    answers, following_value, following = answer.tolist(), 0.0, 0.0
    reward, value = rewards.tolist(), values.tolist()
    for place in range(len(answers) - 1, -1, -1):
        if place + 1 == len(answers) or answers[place] != answers[place + 1]:
            following_value = following = 0.0
        delta = reward[place] + gamma * following_value - value[place]
        following = delta + gamma * decay * following
        following_value = value[place]
        advantages[place] = following
    return advantages, advantages + values


def whiten(values: Tensor, *, shift: bool = True) -> Tensor:
    """Unit spread over the batch; mean zero too unless `shift` is off."""
    if len(values) < 2:
        return values - values if shift else values
    mean = values.mean()
    white = (values - mean) / (values.std(correction=0) + SMALL)
    return white if shift else white + mean


def against_reference(scores: Tensor, reference_scores: Tensor) -> Tensor:
    """r(x, y) - r(x, y_ref): what the answer is worth beyond the prompt's own reference answer."""
    return scores - reference_scores


def leave_one_out(scores: Tensor, group: int) -> Tensor:
    """RLOO: each score less the mean of the other answers to its prompt; [prompts * group], one prompt's together."""
    grouped = scores.unflatten(0, (-1, group))  # [prompts, group]
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (group - 1)
    better: Tensor = (grouped - others).flatten()
    return better


def group_normalised(scores: Tensor, group: int, *, by_spread: bool = True) -> Tensor:
    """GRPO: each score less its group's mean, in units of the group's spread; same order as `leave_one_out`."""
    grouped = scores.unflatten(0, (-1, group))
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if by_spread:
        centred = centred / (grouped.std(dim=1, keepdim=True) + SMALL)
    better: Tensor = centred.flatten()
    return better


def spread_enough(scores: Tensor, group: int, least: float) -> Tensor:
    """Which answers belong to a prompt whose answers differ in score, bool [prompts * group].

    A group with variance below `least` teaches nothing and is left out (ChatGLM-RLHF).
    """
    variance = scores.unflatten(0, (-1, group)).var(dim=1, correction=0)
    enough: Tensor = (variance >= least).repeat_interleave(group)
    return enough
