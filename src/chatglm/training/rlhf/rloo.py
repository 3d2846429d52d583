"""Learning without a value model: several answers to a prompt are each other's baseline.

RLOO: leave-one-out advantages, the KL in the reward, one ratio an answer (Ahmadian et al. 2024). GRPO: advantages in
units of the group's spread, one ratio a token, the KL (k3) in the loss (Shao et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..settings import in_range
from .advantages import group_normalised, leave_one_out, spread_enough, whiten
from .answers import sum_by_answer
from .experience import Experience

Kind = Literal["rloo", "grpo"]


@dataclass(frozen=True)
class GroupSettings:
    """Figures of the algorithm.

    kind           rloo or grpo
    answers        drawn for each prompt, at least 2
    clip           ratio may move the loss within 1 ± clip
    least_variance prompts whose answers' scores vary less are left out
    by_spread      grpo: divide by the group's spread
    whiten         rloo: advantages of the batch to mean 0 and spread 1
    """

    kind: Kind = "rloo"
    answers: int = field(default=4, metadata=in_range(low=2))
    clip: float = field(default=0.2, metadata=in_range(low=0))
    least_variance: float = field(default=1e-4, metadata=in_range(low=0))
    by_spread: bool = True
    whiten: bool = False


@dataclass(frozen=True)
class GroupTargets:
    """Advantage of each answer, [answers], and whether its prompt takes part, bool [answers]."""

    advantages: Tensor
    takes_part: Tensor


def group_targets(experience: Experience, beta: float, settings: GroupSettings) -> GroupTargets:
    """Advantages of every answer; answers to one prompt lie together."""
    scores, group = experience.scores, settings.answers
    takes_part = spread_enough(scores, group, settings.least_variance)
    if settings.kind == "grpo":
        return GroupTargets(group_normalised(scores, group, by_spread=settings.by_spread), takes_part)
    penalised = scores - beta * sum_by_answer(experience.log_ratio, experience.answer, len(scores))
    advantages = leave_one_out(penalised, group)
    return GroupTargets(whiten(advantages) if settings.whiten else advantages, takes_part)
