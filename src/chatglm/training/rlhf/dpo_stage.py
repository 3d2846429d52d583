"""`chatglm train dpo`: a policy straight from a file of preferences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...model import GLM, Attend, sdpa_attention
from ..loop import Report, train
from ..methods import tuned
from ..metrics import Say
from ..preparing import DTYPES, precision_of
from ..run_config import AT_LEAST_0, SHARE, RunConfig
from ..samples import Sample
from ..sharding import joined
from ..task import MeteredLoss, Task
from .copying import in_dtype
from .dpo import PairScores, dpo_loss
from .pairs import PairBatch, PairSource
from .policy import action_logprobs, glm_in, score_actions
from .preferences import Pair, policy_row
from .reward_stage import PreferenceData, calm, read_pairs
from .sharing import from_all, own_stretch


@dataclass(frozen=True)
class DPOSettings:
    """Figures of the loss: see dpo.dpo_loss."""

    beta: float = field(default=0.1, metadata=AT_LEAST_0)
    sft: float = field(default=0.1, metadata=AT_LEAST_0)
    by_length: bool = False
    smoothing: float = field(default=0.0, metadata=SHARE)


@dataclass(frozen=True)
class DPORun(RunConfig):
    """A run of this stage; `batch.rows` counts pairs."""

    data: PreferenceData = field(default_factory=PreferenceData)
    dpo: DPOSettings = field(default_factory=DPOSettings)


def reference_sums(model: GLM, pairs: Sequence[Pair], *, attend: Attend = sdpa_attention) -> Tensor:
    """Log-probability of both answers of each pair, fp32 [pairs, 2]: what the reference says once and for all.

    Each process of a run scores a stretch of the pairs; a collective.
    """
    own = own_stretch(len(pairs))
    return torch.cat(from_all(lambda: _own_sums(model, pairs[own.start : own.stop], attend)))


def _own_sums(model: GLM, pairs: Sequence[Pair], attend: Attend) -> Tensor:
    if not pairs:
        return torch.empty(0, 2)
    samples = [sample for pair in pairs for sample in policy_row(pair, model.config)]
    was_training = model.training
    logprobs, _ = action_logprobs(model.eval(), samples, attend=attend)  # nothing of an adapter is dropped
    model.train(was_training)
    lengths = [sample.loss_tokens for sample in samples]
    sums: Tensor = torch.stack([part.sum() for part in logprobs.cpu().split(lengths)]).unflatten(0, (-1, 2))
    return sums


def preference_loss(
    settings: DPOSettings, attend: Attend = sdpa_attention
) -> Callable[[torch.nn.Module, PairBatch], MeteredLoss]:
    """The loss of a batch of pairs under a policy; the batch brings the reference's log-probabilities."""

    def loss(model: torch.nn.Module, pairs: PairBatch) -> MeteredLoss:
        assert pairs.reference is not None
        scored = score_actions(glm_in(model), pairs.batch, attend=attend)
        policy = PairScores.of_answers(scored.sums, scored.lengths)
        reference = PairScores.of_answers(pairs.reference, scored.lengths)
        losses, watched = dpo_loss(
            policy,
            reference,
            beta=settings.beta,
            sft=settings.sft,
            by_length=settings.by_length,
            smoothing=settings.smoothing,
        )
        count = len(losses)
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
            name: (values.sum(), count) for name, values in watched.items()
        }
        metrics["entropy"] = (scored.entropy.sum(), len(scored.entropy))
        return MeteredLoss(losses.sum(), count, metrics)

    return loss


def dpo_task(
    model: torch.nn.Module, pairs: Sequence[Pair], held_out: Sequence[Pair], settings: DPOSettings, *, seed: int = 0
) -> Task:
    """What the loop runs: `model` is the policy, or holds it (adapters). The reference is the policy as it is now."""
    policy = glm_in(model)

    def rows(pair: Pair) -> list[Sample]:
        return policy_row(pair, policy.config)

    def source(part: Sequence[Pair], *, shuffle: bool) -> PairSource:
        return PairSource(part, rows, seed, reference_sums(policy, part), shuffle)

    return Task(
        model=model,
        loss=preference_loss(settings),
        source=source(pairs, shuffle=True),
        held_out=source(held_out, shuffle=False) if held_out else None,
    )


def run(config: DPORun, *, progress: Say | None = None, restart: bool = False) -> Report:
    """Train, and write `OUT/model`."""
    pairs, held = read_pairs(config.data, config.model, config.seed, config.batch.length)
    made = tuned(config)
    with joined(config.parallel, config.compute) as world:
        made.model.to(world.device)
        narrow = in_dtype(made.model, DTYPES[precision_of(config.compute, world.device)])
        task = dpo_task(made.model, pairs, held, config.dpo, seed=config.seed)
        task.exported = made.exported
        for handle in narrow:  # the loop has its own
            handle.remove()
        return train(task, calm(config), progress=progress, restart=restart)
