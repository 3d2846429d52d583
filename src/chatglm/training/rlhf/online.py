"""The loop of learning from one's own answers, as a task of the common loop: draw a round, take its steps, draw again.

A round draws answers for some prompts with the weights as they are, has them rewarded, and is then walked through once
or several times in minibatches. Every draw is a function of (seed, round); a checkpoint in the middle of a round keeps
the round, so a resumed run repeats itself exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ...model import GLM, Attend, sdpa_attention
from ...tokenizer import Tokenizer
from ..loss import LossSum, batch_loss
from ..samples import Batch
from ..settings import in_range
from ..task import MeteredLoss, Source
from .experience import Experience, RewardFunction, RewardRules, gather_experience, put_together, reward_answers
from .guards import AdaptiveBeta
from .pairs import permutation
from .policy import ActionScores, score_actions
from .reference import Reference
from .rollout import Answer, Prompt, RolloutEngine, RolloutRate
from .rounds import ROUND_FILE, Round, restored, stored
from .sharing import from_all, own_stretch
from .watch import answer_metrics, kl_metrics

logger = logging.getLogger(__name__)

RATIO_TOLERANCE = 1e-3
"""Before the first update of a round old and new log-probabilities are the same numbers."""

GENERAL_SHARE = 4
"""Answers for each row of general data in a step: those rows are packed, and longer."""


@dataclass(frozen=True)
class OnlineSettings:
    """What all algorithms share.

    prompts       of a round
    epochs        walks through a round's answers
    max_new       token limit of an answer
    beta          price of a nat of KL; beta_target: nats an answer that β is steered to, None: constant
    sft           weight of the loss on general data beside the algorithm's, against forgetting
    rollout_batch answers that the engine runs at once
    """

    prompts: int = field(default=32, metadata=in_range(low=1))
    epochs: int = field(default=1, metadata=in_range(low=1))
    max_new: int = field(default=128, metadata=in_range(low=1))
    beta: float = field(default=0.05, metadata=in_range(low=0))
    beta_target: float | None = field(default=None, metadata=in_range(low=0))
    sft: float = field(default=0.1, metadata=in_range(low=0))
    rollout_batch: int = field(default=64, metadata=in_range(low=1))


@dataclass(frozen=True)
class OnlineBatch:
    """Answers of a round, one a row, with what their actions are moved by.

    logprobs, reference  fp32 [actions]: log π when drawn, and of the reference
    targets              of the algorithm, by name: [actions] or [answers]
    general              a batch of general data for the SFT term
    warms_up             only the value learns in this step
    """

    batch: Batch
    logprobs: Tensor
    reference: Tensor
    targets: Mapping[str, Tensor]
    general: Batch | None
    beta: float
    warms_up: bool
    is_first: bool

    @property
    def tokens(self) -> int:
        return self.batch.tokens + (self.general.tokens if self.general is not None else 0)

    def to(self, device: torch.device | str) -> OnlineBatch:
        return replace(
            self,
            batch=self.batch.to(device),
            logprobs=self.logprobs.to(device),
            reference=self.reference.to(device),
            targets={name: values.to(device) for name, values in self.targets.items()},
            general=None if self.general is None else self.general.to(device),
        )


class Algorithm(Protocol):
    """PPO, RLOO or GRPO: what they do differently."""

    @property
    def answers_each(self) -> int:
        """Answers drawn for each prompt."""
        ...

    @property
    def warm_up_steps(self) -> int:
        """First steps in which the policy stays as it is."""
        ...

    def values(self, model: nn.Module, experience: Experience) -> Tensor | None:
        """What a value model says of the actions of some answers of a round, [actions]; None without one."""
        ...

    def targets(self, experience: Experience, beta: float) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What each action [actions] or answer [answers] of the whole round is moved by, and figures of it."""
        ...

    def loss(self, model: nn.Module, scored: ActionScores, batch: OnlineBatch) -> MeteredLoss:
        """Sum over actions or answers, and their number."""
        ...


class Online:
    """State of an online run between steps; gives the loop its source, its loss and its hooks.

    model    the module that the loop trains: the policy, or one that holds it first
    general  batches for the SFT term, by row number
    """

    def __init__(
        self,
        model: nn.Module,
        policy: GLM,
        reference: Reference,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        reward: RewardFunction,
        algorithm: Algorithm,
        settings: OnlineSettings,
        *,
        batch_rows: int,
        rules: RewardRules | None = None,
        general: Source | None = None,
        seed: int = 0,
        attend: Attend = sdpa_attention,
        engine_dtype: torch.dtype | None = None,
        kernels: str | None = None,
    ) -> None:
        if not prompts:
            raise TrainingError("there are no prompts to answer", cure="prompts: {files: [prompts.jsonl]}")
        self.model, self.policy, self.reference = model, policy, reference
        self.tokenizer, self.prompts, self.reward = tokenizer, list(prompts), reward
        self.algorithm, self.settings, self.rules = algorithm, settings, rules or RewardRules()
        self.general, self.seed, self.attend = general, seed, attend
        self.batch_rows = batch_rows
        self.answers_a_round = settings.prompts * algorithm.answers_each
        if self.answers_a_round % batch_rows:
            raise TrainingError(
                f"a round of {self.answers_a_round} answers cannot be cut into steps of `batch.rows` {batch_rows}",
                cure=f"batch.rows: {_fitting(self.answers_a_round, batch_rows)}",
            )
        self.steps_a_round = settings.epochs * self.answers_a_round // batch_rows
        self.engine = RolloutEngine(
            policy, tokenizer, settings.max_new, batch=settings.rollout_batch, dtype=engine_dtype, kernels=kernels
        )
        self.beta = AdaptiveBeta(settings.beta, settings.beta_target)
        self.round: Round | None = None
        if isinstance(reference, GLM):
            reference.requires_grad_(False).eval()

    # hooks of the loop

    def before_step(self, step: int) -> None:
        """Draw a round where one begins."""
        number = step // self.steps_a_round
        if self.round is None or self.round.number != number:
            if self.round is not None:
                self.beta.update(self.round.figures["kl_k1"], self.answers_a_round)
            self.round = self.draw(number)

    def draw(self, number: int) -> Round:
        """Answers, rewards, log-probabilities and targets of round `number`; a collective.

        Each process draws and scores its stretch of the prompts; advantages are those of the whole round.
        """
        was_training = self.model.training
        self.model.eval()
        parts = from_all(lambda: self._own_part(number))
        self.model.train(was_training)
        experience = put_together([part for part, _ in parts])
        answers = experience.answers
        tokens, seconds = sum(rate.tokens for _, rate in parts), max(rate.seconds for _, rate in parts)
        targets, figures = self.algorithm.targets(experience, self.beta.beta)
        figures = {
            "reward": experience.rewards.mean().item(),
            "reward_std": experience.rewards.std(correction=0).item(),
            "reward_over_baseline": experience.scores.mean().item(),
            "beta": self.beta.beta,
            **kl_metrics(experience.log_ratio, experience.answer, len(answers)),
            "entropy": experience.entropy.mean().item(),
            **answer_metrics([answer.ids for answer in answers], [answer.is_finished for answer in answers]),
            "rollout_tokens_per_s": tokens / seconds if seconds else 0.0,
            "engine_ratio_error": _engine_error(experience),
            **figures,
        }
        return Round(number, experience, targets, figures)

    def loss(self, model: nn.Module, batch: OnlineBatch) -> LossSum:
        """The algorithm's loss and the SFT term, with everything that is watched."""
        made = self.algorithm.loss(model, self._scored(batch), batch)
        total, metrics = made.total, dict(made.metrics)
        if batch.general is not None:
            known = batch_loss(self.policy, batch.general, attend=self.attend)
            metrics["sft_loss"] = (known.total.detach(), known.count)
            if not batch.warms_up:
                total = total + self.settings.sft * known.mean() * max(1, made.count)
        self._check_ratio(metrics, batch)
        assert self.round is not None
        metrics |= {name: (value, 1.0) for name, value in self.round.figures.items()}
        return MeteredLoss(total, made.count, metrics)

    def on_checkpoint(self, folder: Path) -> None:
        """Keep the round that is being walked through."""
        if self.round is not None:
            torch.save(stored(self.round, self.beta.beta), folder / ROUND_FILE)

    def on_resume(self, folder: Path) -> None:
        """Take the round up again."""
        path = folder / ROUND_FILE
        if path.exists():
            kept = torch.load(path, weights_only=True)
            self.beta.beta = kept["beta"]
            count = self.settings.prompts
            own = [self._prompt(kept["number"] * count + place) for place in range(count)]
            self.round = restored(kept, own, self.algorithm.answers_each, self.policy)

    # the source of the loop

    reads_ahead = False
    rows_per_epoch = None

    def batch(self, start: int, count: int) -> OnlineBatch:
        """Answers start … start + count - 1 of the run, which must be of the round that was drawn."""
        held = self.round
        a_round = self.settings.epochs * self.answers_a_round
        number, place = divmod(start, a_round)
        if held is None or held.number != number:
            raise TrainingError(f"round {number} has not been drawn")
        epoch, first = divmod(place, self.answers_a_round)
        order = permutation(self.answers_a_round, self.seed + 1, number * self.settings.epochs + epoch)
        numbers = [int(n) for n in order[first : first + count]]
        actions = held.experience.actions_of(numbers)
        total = len(held.experience.logprobs)
        return OnlineBatch(
            held.experience.batch_of(numbers),
            held.experience.logprobs[actions],
            held.experience.reference[actions],
            {
                name: values[actions] if len(values) == total else values[numbers]
                for name, values in held.targets.items()
            },
            self._general(start, count),
            self.beta.beta,
            warms_up=start // self.batch_rows < self.algorithm.warm_up_steps,
            is_first=place < self.batch_rows,
        )

    # parts

    def _general(self, start: int, count: int) -> Batch | None:
        if self.general is None or not self.settings.sft:
            return None
        batch = self.general.batch(start // GENERAL_SHARE, max(1, count // GENERAL_SHARE))
        assert isinstance(batch, Batch)
        return batch

    def _prompt(self, number: int) -> Prompt:
        """The prompt at a place of the endless order."""
        epoch, index = divmod(number, len(self.prompts))
        return self.prompts[int(permutation(len(self.prompts), self.seed, epoch)[index])]

    def _own_part(self, number: int) -> tuple[Experience, RolloutRate]:
        """Own answers of a round with all that is said of them, and how fast they were drawn."""
        count, each = self.settings.prompts, self.algorithm.answers_each
        own = own_stretch(count)
        prompts = [self._prompt(number * count + place) for place in own]
        rate = self.engine.rate
        before = replace(rate)
        seed = self.seed * 1_000_003 + number
        answers = self.engine.sample(prompts, each=each, seed=seed, first=own.start * each)
        experience = self._experience(answers)
        experience = replace(experience, values=self.algorithm.values(self.model, experience))
        return experience, RolloutRate(rate.tokens - before.tokens, rate.seconds - before.seconds)

    def _experience(self, answers: list[Answer]) -> Experience:
        rewards, scores = reward_answers(answers, self.reward, self.rules, self.tokenizer.encode)
        return gather_experience(self.policy, self.reference, answers, rewards, scores, attend=self.attend)

    def _scored(self, batch: OnlineBatch) -> ActionScores:
        return score_actions(self.policy, batch.batch, attend=self.attend)

    def _check_ratio(self, metrics: Mapping[str, Any], batch: OnlineBatch) -> None:
        """Where nothing was updated since the draw, a ratio other than 1 is an error of the arithmetic."""
        if batch.is_first and "ratio" in metrics:
            total, by = metrics["ratio"]
            off = abs(float(total) / max(float(by), 1.0) - 1)
            if off > RATIO_TOLERANCE and float(by):
                logger.warning(
                    "log-probabilities of the draw and of the first minibatch differ: ratio off by %.4f", off
                )


def _fitting(answers: int, rows: int) -> int:
    """The divisor of `answers` nearest to `rows`."""
    return min((n for n in range(1, answers + 1) if answers % n == 0), key=lambda n: abs(n - rows))


def _engine_error(experience: Experience) -> float:
    """|mean ratio - 1| of the training forward against what the engine said while it drew."""
    said = torch.tensor([value for answer in experience.answers for value in answer.logprobs])
    if len(said) != len(experience.logprobs):
        return 0.0
    return abs((experience.logprobs - said).exp().mean().item() - 1)
