"""Proximal policy optimisation over the tokens of an answer.

Source: Schulman et al. 2017, eq. 7; the value's own clipping and the KL in the reward as in Ziegler et al. 2019;
baseline by a reference answer instead of normalised rewards as in ChatGLM-RLHF (spec/training.md §4.5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...model import Attend, sdpa_attention
from ..samples import Batch
from ..settings import in_range
from .advantages import gae, token_rewards, whiten
from .answers import actions_of
from .experience import Experience
from .policy import ActionScores
from .reward import RewardModel
from .watch import explained_variance


@dataclass(frozen=True)
class PPOSettings:
    """Figures of the algorithm.

    clip          ratio may move the loss within 1 ± clip
    value_clip    a value may move by this from what it was when the answer was drawn; 0: free
    value_weight  of the value's loss beside the policy's, where both share a trunk
    value_warmup  steps in which only the value learns
    gamma, decay  of the advantage estimation (λ is `decay`)
    whiten        advantages to mean 0 and spread 1; off where rewards have a reference answer's as baseline
    """

    clip: float = field(default=0.2, metadata=in_range(low=0))
    value_clip: float = field(default=0.2, metadata=in_range(low=0))
    value_weight: float = field(default=0.1, metadata=in_range(low=0))
    value_warmup: int = field(default=20, metadata=in_range(low=0))
    gamma: float = field(default=1.0, metadata=in_range(low=0, high=1))
    decay: float = field(default=0.95, metadata=in_range(low=0, high=1))
    whiten: bool = False
    value: Literal["separate", "shared"] = "separate"


@dataclass(frozen=True)
class Targets:
    """What each action is to be moved by, [actions] fp32; `values` and `returns` only where there is a value model."""

    advantages: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None


def clipped_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each action (or answer), and ratio and whether it was clipped, each the shape of `logprobs`."""
    ratio = (logprobs - old).exp()
    plain, held = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    with torch.no_grad():
        is_clipped = (held < plain).float()
    return -torch.minimum(plain, held), {"ratio": ratio.detach(), "clip_fraction": is_clipped}


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of each value, the larger of the free and the clipped one, [actions]."""
    free = (values - returns).square()
    if not clip:
        return free / 2
    held = old + (values - old).clamp(-clip, clip)
    return torch.maximum(free, (held - returns).square()) / 2


class SharedValue(nn.Module):
    """A value head on the policy's own hidden states; it does not train the trunk through `weight` alone."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """fp32 [...] of hidden states [..., hidden]."""
        output: Tensor = self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)
        return output.float()


def action_values(
    value: RewardModel | SharedValue, scored: ActionScores, batch: Batch, *, attend: Attend = sdpa_attention
) -> Tensor:
    """The value before each action, fp32 [actions]."""
    if isinstance(value, SharedValue):
        shared: Tensor = value(scored.hidden)
        return shared
    rows, columns, _ = actions_of(batch)
    return value.values(value.hidden(batch, attend=attend)[rows, columns])


def ppo_targets(experience: Experience, values: Tensor, beta: float, settings: PPOSettings) -> Targets:
    """Advantages and returns of every action, from rewards that hold the KL penalty."""
    rewards = token_rewards(experience.scores, experience.log_ratio, experience.answer, beta)
    advantages, returns = gae(rewards, values, experience.answer, gamma=settings.gamma, decay=settings.decay)
    return Targets(whiten(advantages) if settings.whiten else advantages, values, returns)


def value_metrics(targets: Targets) -> dict[str, float]:
    """How well the value knew what came, before it learned from it."""
    if targets.values is None or targets.returns is None:
        return {}
    return {
        "explained_variance": explained_variance(targets.values, targets.returns),
        "value_mean": targets.values.mean().item(),
        "return_mean": targets.returns.mean().item(),
    }
