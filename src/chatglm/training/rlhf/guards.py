"""What stops a run before it has gone wrong for long: limits on KL and reward, and alarms for a hacked reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Guards:
    """Limits of a run.

    kl_limit         mean nats an answer from the reference (k3 of a step); above it the run stops
    reward_clip      rewards are cut to ±this before they are used
    patience         evaluations over which reward and judge must part before the run stops; 0: never
    least_parting    how much the judged rate must have fallen, and the reward risen, to count as parting
    alarm_drop       the second reward model, trained on another split, may fall this far while the first rises
    canaries         prompts whose answers are printed at each evaluation
    """

    kl_limit: float = 10.0
    reward_clip: float = 5.0
    patience: int = 2
    least_parting: float = 0.05
    alarm_drop: float = 0.5
    canaries: tuple[str, ...] = ()


def clip_rewards(rewards: Tensor, limit: float) -> Tensor:
    """Rewards within ±limit: one outlier of the reward model moves the policy no further than that."""
    return rewards.clamp(-limit, limit)


@dataclass
class Watchman:
    """Looks at the metrics of each step and evaluation; says why to stop, or None."""

    guards: Guards
    history: list[dict[str, float]] = field(default_factory=list)

    def after_step(self, metrics: Mapping[str, float]) -> str | None:
        """metrics: `kl_k3` of the step that was just made."""
        kl, limit = metrics.get("kl_k3", 0.0), self.guards.kl_limit
        if kl > limit:
            return f"the policy is {kl:.2f} nats an answer from its reference, the limit is {limit:g}"
        return None

    def after_evaluation(self, metrics: Mapping[str, float]) -> str | None:
        """metrics: `reward`, and where there are such, `judged_rate` and `alarm_reward` (second reward model)."""
        self.history.append(dict(metrics))
        return self.verdict()

    def verdict(self) -> str | None:
        """Why to stop, by all evaluations so far."""
        return self._parting() or self._alarm()

    def _parting(self) -> str | None:
        patience, least = self.guards.patience, self.guards.least_parting
        rated = [entry for entry in self.history if "judged_rate" in entry and "reward" in entry]
        if not patience or len(rated) <= patience:
            return None
        best = max(rated[:-patience], key=lambda entry: entry["judged_rate"])
        recent = rated[-patience:]
        has_parted = all(
            entry["judged_rate"] < best["judged_rate"] - least and entry["reward"] > best["reward"] for entry in recent
        )
        if not has_parted:
            return None
        return (
            f"reward and judge part: since the best evaluation the judged rate fell from {best['judged_rate']:.2f} to "
            f"{recent[-1]['judged_rate']:.2f} while the reward rose from {best['reward']:.2f} to "
            f"{recent[-1]['reward']:.2f}"
        )

    def _alarm(self) -> str | None:
        rated = [entry for entry in self.history if "alarm_reward" in entry and "reward" in entry]
        if len(rated) < 2:
            return None
        best, now = max(rated[:-1], key=lambda entry: entry["alarm_reward"]), rated[-1]
        fell = best["alarm_reward"] - now["alarm_reward"]
        if fell > self.guards.alarm_drop and now["reward"] > best["reward"]:
            return f"the second reward model fell by {fell:.2f} while the first rose: the reward is being hacked"
        return None


@dataclass
class AdaptiveBeta:
    """β that steers the KL towards a target (Ziegler et al. 2019, §2.2); constant without a target."""

    beta: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, answers: int) -> None:
        """After a step: kl in nats an answer, over so many answers."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * answers / self.horizon
