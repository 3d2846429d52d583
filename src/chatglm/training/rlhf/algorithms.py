"""PPO, RLOO and GRPO behind one face (online.Algorithm): what moves a round's answers, and the loss of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...model import GLM, Attend, sdpa_attention
from ..task import MeteredLoss
from .answers import one_a_row, sum_by_answer
from .copying import copy_of
from .experience import Experience
from .online import OnlineBatch
from .policy import ActionScores, by_tokens, score_actions
from .ppo import (
    PPOSettings,
    SharedValue,
    Targets,
    action_values,
    clipped_loss,
    clipped_value_loss,
    ppo_targets,
    value_metrics,
)
from .reward import RewardModel
from .rloo import GroupSettings, group_targets
from .watch import k3_of

MOST_TOKENS = 16_384


class PolicyAndValue(nn.Module):
    """What PPO trains: the policy, which is exported, and the value model."""

    def __init__(self, policy: GLM, value: RewardModel | SharedValue) -> None:
        super().__init__()
        self.policy = policy
        self.value = value


def with_value(policy: GLM, settings: PPOSettings, start: RewardModel | None = None) -> PolicyAndValue:
    """The policy with a value model: a head on its own trunk, or a trunk apart that starts as the reward model's."""
    if settings.value == "shared":
        return PolicyAndValue(policy, SharedValue(policy.config.hidden_size).to(policy.device))
    value = RewardModel(copy_of(start.glm if start is not None else policy).float())
    value.glm.requires_grad_(True)
    if start is not None:
        with torch.no_grad():
            value.score.weight.copy_(start.score.weight)
            value.score.bias.copy_(start.score.bias)
    return PolicyAndValue(policy, value)


@dataclass
class PPO:
    """Token by token, with a value model."""

    settings: PPOSettings
    attend: Attend = sdpa_attention

    @property
    def answers_each(self) -> int:
        return 1

    @property
    def warm_up_steps(self) -> int:
        return self.settings.value_warmup

    @torch.no_grad()
    def values(self, model: nn.Module, experience: Experience) -> Tensor:
        """What the value model expects before every action."""
        assert isinstance(model, PolicyAndValue)
        parts = [torch.empty(0)]
        for numbers in by_tokens([len(sample) for sample in experience.samples], MOST_TOKENS):
            batch = one_a_row(experience.samples[n] for n in numbers).to(model.policy.device)
            scored = score_actions(model.policy, batch, attend=self.attend)
            parts.append(action_values(model.value, scored, batch, attend=self.attend).cpu())
        return torch.cat(parts)

    def targets(self, experience: Experience, beta: float) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Advantages, values and returns of every action."""
        assert experience.values is not None
        found = ppo_targets(experience, experience.values, beta, self.settings)
        assert found.values is not None and found.returns is not None
        named = {"advantages": found.advantages, "values": found.values, "returns": found.returns}
        return named, {**value_metrics(found), "advantage_std": found.advantages.std(correction=0).item()}

    def loss(self, model: nn.Module, scored: ActionScores, batch: OnlineBatch) -> MeteredLoss:
        """Clipped policy loss and clipped value loss, summed over actions."""
        assert isinstance(model, PolicyAndValue)
        goal = Targets(batch.targets["advantages"], batch.targets["values"], batch.targets["returns"])
        assert goal.values is not None and goal.returns is not None
        losses, watched = clipped_loss(scored.logprobs, batch.logprobs, goal.advantages, self.settings.clip)
        values = action_values(model.value, scored, batch.batch, attend=self.attend)
        value_losses = clipped_value_loss(values, goal.values, goal.returns, self.settings.value_clip)
        count = len(losses)
        policy_share = 0.0 if batch.warms_up else 1.0
        total = policy_share * losses.sum() + self.settings.value_weight * value_losses.sum()
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
            name: (found.sum(), count) for name, found in watched.items()
        }
        metrics |= {"policy_loss": (losses.detach().sum(), count), "value_loss": (value_losses.detach().sum(), count)}
        return MeteredLoss(total, count, metrics)


@dataclass
class Group:
    """RLOO or GRPO: the answers to one prompt against each other."""

    settings: GroupSettings

    @property
    def answers_each(self) -> int:
        return self.settings.answers

    @property
    def warm_up_steps(self) -> int:
        return 0

    def values(self, model: nn.Module, experience: Experience) -> None:
        """None: the other answers to a prompt are the baseline."""

    def targets(self, experience: Experience, beta: float) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Advantage and part of every answer; RLOO learns from whole answers, GRPO from their actions."""
        found = group_targets(experience, beta, self.settings)
        figures = {
            "advantage_std": found.advantages.std(correction=0).item(),
            "share_without_spread": 1 - found.takes_part.float().mean().item(),
        }
        return {"advantages": found.advantages, "takes_part": found.takes_part.float()}, figures

    def loss(self, model: nn.Module, scored: ActionScores, batch: OnlineBatch) -> MeteredLoss:
        """Clipped loss summed over the answers (RLOO) or actions (GRPO) that take part."""
        advantages, part = batch.targets["advantages"], batch.targets["takes_part"]
        if self.settings.kind == "rloo":
            old = sum_by_answer(batch.logprobs, scored.answer, scored.answers)
            losses, watched = clipped_loss(scored.sums, old, advantages, self.settings.clip)
        else:
            part = part[scored.answer]
            losses, watched = clipped_loss(
                scored.logprobs, batch.logprobs, advantages[scored.answer], self.settings.clip
            )
            losses = losses + batch.beta * k3_of(scored.logprobs - batch.reference)
        count = int(part.sum())
        total = (losses * part).sum()
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
            name: (found.sum(), len(found)) for name, found in watched.items()
        }
        metrics["policy_loss"] = (total.detach(), count)
        return MeteredLoss(total, count, metrics)
