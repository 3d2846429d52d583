"""What a step of online learning looks at: answers just drawn, their rewards, and what policy and reference said.

Kept flat over actions, answer after answer, so that any minibatch is a choice of answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...config import ModelConfig
from ...evaluation.judges import Judge
from ...model import GLM, Attend, sdpa_attention
from ...tokenizer import Tokenizer
from ..samples import Batch, Sample
from .advantages import against_reference
from .answers import closed_sample, one_a_row
from .guards import clip_rewards
from .policy import action_logprobs, by_tokens
from .reference import Reference, standing
from .reward import RewardModel
from .rollout import Answer, Prompt

RewardFunction = Callable[[Sequence[Prompt], Sequence[tuple[int, ...]]], Tensor]
"""(prompts, ids of their answers without `<eop>`) → fp32 [answers]."""

Baseline = Literal["reference", "none"]


@dataclass(frozen=True)
class ModelReward:
    """Scores of a reward model; answers are closed with `<eop>`, which is where it reads."""

    model: RewardModel
    most_tokens: int = 16_384
    attend: Attend = sdpa_attention

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> Tensor:
        config = self.model.config
        room = [config.max_sequence_length - len(prompt.context) - 2 for prompt in prompts]
        samples = [
            closed_sample(prompt.context, ids[:most], config)
            for prompt, ids, most in zip(prompts, answers, room, strict=True)
        ]
        parts = [
            self.model.scores(one_a_row(samples[n] for n in numbers).to(self.model.device), attend=self.attend)
            for numbers in by_tokens([len(sample) for sample in samples], self.most_tokens)
        ]
        return torch.cat(parts).cpu()


@dataclass(frozen=True)
class RuleReward:
    """±1 by a judge: a reward without a model, for what a rule can tell."""

    judge: Judge
    tokenizer: Tokenizer

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> Tensor:
        passed = [self.judge(p.text, self.tokenizer.decode(list(ids))) for p, ids in zip(prompts, answers, strict=True)]
        return torch.tensor([1.0 if good else -1.0 for good in passed])


@dataclass(frozen=True)
class RewardRules:
    """How a score becomes what is learned from.

    clip                 scores are cut to ±clip
    baseline             "reference": less the score of the prompt's own reference answer
    missing_eop_penalty  taken from an answer that did not end within its limit
    """

    clip: float = 5.0
    baseline: Baseline = "reference"
    missing_eop_penalty: float = 1.0


@dataclass(frozen=True)
class Experience:
    """Drawn answers and all that was said of them.

    rewards    [answers]  as the reward function gave them, cut to ±clip
    scores     [answers]  what is learned from: less the baseline and the penalty for a missing end
    logprobs   [actions]  log π when the answers were drawn, by the training forward
    reference  [actions]  log π of the reference
    entropy    [actions]
    answer     [actions]  int64: the answer of each action
    values     [actions]  of a value model, where there is one
    """

    answers: list[Answer]
    samples: list[Sample]
    rewards: Tensor
    scores: Tensor
    logprobs: Tensor
    reference: Tensor
    entropy: Tensor
    answer: Tensor
    starts: list[int]
    values: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """Log π - log π_ref, [actions]."""
        return self.logprobs - self.reference

    def actions_of(self, numbers: Sequence[int]) -> Tensor:
        """Places of the actions of these answers, in this order, int64."""
        return torch.cat([torch.arange(self.starts[n], self.starts[n + 1]) for n in numbers])

    def batch_of(self, numbers: Sequence[int]) -> Batch:
        """These answers as a batch, one a row."""
        return one_a_row(self.samples[n] for n in numbers)


def put_together(parts: Sequence[Experience]) -> Experience:
    """Stretches of a list of answers as one."""
    if len(parts) == 1:
        return parts[0]
    starts, owners = [0], []
    for part in parts:
        owners.append(part.answer + len(starts) - 1)
        starts += [starts[-1] + place for place in part.starts[1:]]
    flat = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("rewards", "scores", "logprobs", "reference", "entropy")
    }
    values = [part.values for part in parts if part.values is not None]
    return Experience(
        answers=[answer for part in parts for answer in part.answers],
        samples=[sample for part in parts for sample in part.samples],
        **flat,
        answer=torch.cat(owners),
        starts=starts,
        values=torch.cat(values) if values else None,
    )


def reward_answers(
    answers: Sequence[Answer], reward: RewardFunction, rules: RewardRules, encode: Callable[[str], list[int]]
) -> tuple[Tensor, Tensor]:
    """Rewards and scores of drawn answers, fp32 [answers] each (see Experience).

    encode  ids of a reference answer's text
    """
    if not answers:
        return torch.empty(0), torch.empty(0)
    prompts = [answer.prompt for answer in answers]
    rewards = clip_rewards(reward(prompts, [answer.ids for answer in answers]).float(), rules.clip)
    scores = rewards
    if rules.baseline == "reference":
        known = [number for number, prompt in enumerate(prompts) if prompt.reference is not None]
        wanted = list(dict.fromkeys(prompts[number] for number in known))
        if wanted:
            found = reward(wanted, [tuple(encode(prompt.reference or "")) for prompt in wanted]).float()
            of = dict(zip(wanted, clip_rewards(found, rules.clip).tolist(), strict=True))
            base = torch.zeros(len(prompts))
            base[known] = torch.tensor([of[prompts[number]] for number in known])
            scores = against_reference(scores, base)
    is_cut = torch.tensor([not answer.is_finished for answer in answers])
    return rewards, scores - rules.missing_eop_penalty * is_cut


def gather_experience(
    policy: GLM,
    reference: Reference,
    answers: list[Answer],
    rewards: Tensor,
    scores: Tensor,
    *,
    attend: Attend = sdpa_attention,
    most_tokens: int = 16_384,
) -> Experience:
    """Run policy and reference over drawn answers."""
    config: ModelConfig = policy.config
    samples = [answer.sample(config) for answer in answers]
    logprobs, entropy = action_logprobs(policy, samples, attend=attend, most_tokens=most_tokens)
    with standing(reference) as model:
        said, _ = action_logprobs(model, samples, attend=attend, most_tokens=most_tokens)
    counts = [sample.loss_tokens for sample in samples]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    owner = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts, dtype=torch.int64))
    return Experience(
        answers, samples, rewards, scores, logprobs.cpu(), said.to(logprobs.device).cpu(), entropy.cpu(), owner, starts
    )
