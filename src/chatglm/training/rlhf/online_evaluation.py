"""What an online run is judged by: held-out prompts, an independent judge, general data, and canaries that are read.

Answers are drawn at temperature 1 with the same seed at every evaluation; the first answers of the reference are kept,
and the win-rate is against them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...evaluation.judges import Judge, judged_rate, win_rate
from ...model import GLM, Attend, sdpa_attention
from ..loss import batch_loss
from ..metrics import Say
from ..samples import Batch
from .experience import Experience, RewardFunction, gather_experience, put_together
from .guards import Guards, Watchman, clip_rewards
from .online import Online
from .reference import standing
from .rollout import Answer, Prompt, RolloutEngine, RolloutRate, make_prompt
from .sharing import from_all, own_stretch
from .watch import answer_metrics, kl_metrics

GUARDS_FILE = "guards.json"

EVALUATION_SEED = 20_230_315
"""Of the answers that are judged; apart from those that are trained on."""


@dataclass
class Evaluation:
    """Figures of a policy on held-out prompts; `stop_reason` is set by the guards.

    judge    independent of the reward; None: no judged rate
    alarm    a second reward model, trained on another split
    general  rows of general data, whose loss tells what was forgotten
    """

    online: Online
    prompts: Sequence[Prompt]
    guards: Guards = field(default_factory=Guards)
    judge: Judge | None = None
    alarm: RewardFunction | None = None
    general: Batch | None = None
    say: Say = lambda text: None
    stop_reason: str | None = None
    first: list[Answer] = field(default_factory=list)
    greedy_at_first: list[Answer] = field(default_factory=list)
    general_at_first: float | None = None
    figures: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watchman = Watchman(self.guards)

    def begin(self) -> dict[str, float]:
        """Figures of the reference, before anything was learned; call it once."""
        online, own = self.online, self.online.engine
        with standing(online.reference) as reference:
            engine = replace(own, model=reference, rate=RolloutRate(), _engine=None, _capacity=0, _twin=None)
            self.first = self._drawn(engine)
            self.greedy_at_first = self._greedy(engine)
            if self.general is not None:
                self.general_at_first = general_loss(reference, self.general, attend=online.attend)
            return self._judge(self.first, reference)

    def __call__(self) -> dict[str, float]:
        """Figures of the policy now, canaries printed, guards asked."""
        online = self.online
        answers = self._drawn(online.engine)
        found = self._judge(answers, online.policy)
        if self.general is not None and self.general_at_first is not None:
            loss = general_loss(online.policy, self.general, attend=online.attend)
            found |= {"general_loss": loss, "general_loss_up": loss / self.general_at_first - 1}
        self._print_canaries()
        self.figures.append(found)
        self.stop_reason = self.stop_reason or self.watchman.after_evaluation(
            {name.removeprefix("eval_"): value for name, value in found.items()}
        )
        return found

    def kl(self, against: GLM) -> float:
        """Nats an answer (k3) between the policy and another model, on the held-out prompts."""
        online = self.online
        answers = self._drawn(online.engine)
        if not answers:
            return 0.0
        own = _own(answers)
        zeros = torch.zeros(len(own))
        seen = put_together(from_all(lambda: gather_experience(online.policy, against, own, zeros, zeros)))
        return kl_metrics(seen.log_ratio, seen.answer, len(answers))["kl_k3"]

    def after_step(self) -> str | None:
        """Why to stop, by the round that is being walked through; None to go on."""
        if self.online.round is not None:
            self.stop_reason = self.stop_reason or self.watchman.after_step(self.online.round.figures)
        return self.stop_reason

    def on_checkpoint(self, folder: Path) -> None:
        """Keep what the guards remember."""
        facts = {"figures": self.figures, "history": self.watchman.history}
        (folder / GUARDS_FILE).write_text(json.dumps(facts), encoding="utf-8")

    def on_resume(self, folder: Path) -> None:
        """Remember it again, and judge it by the limits of now."""
        path = folder / GUARDS_FILE
        if path.exists():
            facts = json.loads(path.read_text(encoding="utf-8"))
            self.figures, self.watchman.history = facts["figures"], facts["history"]
            self.stop_reason = self.watchman.verdict()

    def _drawn(self, engine: RolloutEngine) -> list[Answer]:
        """An answer to each held-out prompt, of which every process draws some."""
        own = own_stretch(len(self.prompts))
        asked = self.prompts[own.start : own.stop]
        drawn = from_all(lambda: engine.sample(asked, seed=EVALUATION_SEED, first=own.start))
        return [answer for part in drawn for answer in part]

    def _greedy(self, engine: RolloutEngine) -> list[Answer]:
        made = from_all(lambda: engine.greedy(_own(self.prompts)))
        return [answer for part in made for answer in part]

    def _judge(self, answers: list[Answer], policy: GLM) -> dict[str, float]:
        if not answers:
            return {}
        ids = [answer.ids for answer in answers]
        parts = from_all(lambda: self._score(_own(answers), policy))
        seen = put_together([part for part, _ in parts])
        found = {
            "reward": seen.rewards.mean().item(),
            **kl_metrics(seen.log_ratio, seen.answer, len(answers)),
            "entropy": seen.entropy.mean().item(),
            **answer_metrics(ids, [answer.is_finished for answer in answers]),
        }
        if self.alarm is not None:
            found["alarm_reward"] = torch.cat([alarm for _, alarm in parts]).mean().item()
        if self.judge is not None:
            texts, asked = [answer.text for answer in answers], [answer.prompt.text for answer in answers]
            found["judged_rate"] = judged_rate(self.judge, asked, texts)
            if self.first:
                found["win_rate"] = win_rate(self.judge, asked, texts, [answer.text for answer in self.first]).rate
        return {f"eval_{name}": value for name, value in found.items()}

    def _score(self, answers: list[Answer], policy: GLM) -> tuple[Experience, torch.Tensor]:
        """Some answers with their rewards and those of the second reward model (empty without one)."""
        online, limit = self.online, self.guards.reward_clip
        rewards, alarm = torch.empty(0), torch.empty(0)
        if answers:
            prompts, ids = [answer.prompt for answer in answers], [answer.ids for answer in answers]
            rewards = clip_rewards(online.reward(prompts, ids).float(), limit)
            if self.alarm is not None:
                alarm = clip_rewards(self.alarm(prompts, ids).float(), limit)
        return gather_experience(policy, online.reference, answers, rewards, rewards, attend=online.attend), alarm

    def _print_canaries(self) -> None:
        online = self.online
        if self.guards.canaries:
            prompts = [make_prompt(online.tokenizer, text) for text in self.guards.canaries]
            for answer in online.engine.greedy(prompts):
                self.say(f"  canary {answer.prompt.text!r}: {answer.text!r}")


Things = TypeVar("Things", bound=Sequence[Any])


def _own(things: Things) -> Things:
    """The stretch of this process."""
    own = own_stretch(len(things))
    return things[own.start : own.stop]  # type: ignore[return-value]


SAID = ("kept", "reward_drawn", "reward_kept", "judged_rate", "reward", "kl_k3", "general_loss_up", "answer_length")


def said(figures: Mapping[str, float]) -> str:
    """The figures that are worth a line on the screen."""
    named = {name.removeprefix("eval_"): value for name, value in figures.items()}
    return ", ".join(f"{name.replace('_', ' ')} {named[name]:.3g}" for name in SAID if name in named)


@torch.no_grad()
def general_loss(model: GLM, batch: Batch, *, attend: Attend = sdpa_attention) -> float:
    """Nats a token of general data."""
    return float(batch_loss(model, batch.to(model.device), attend=attend).mean())
