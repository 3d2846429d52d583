"""`chatglm train reward`: a reward model from a file of preferences, and its report on pairs it has not seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ...checkpoint.atomic import write_whole
from ...errors import TrainingError
from ...model import Attend, sdpa_attention
from ..loop import Report, train
from ..metrics import Say
from ..run_config import AT_LEAST_0, AT_LEAST_1, SHARE, ModelSettings, RunConfig
from ..samples import Sample
from ..sharding import joined, whole
from ..starting import source_folder, starting_config, starting_model, starting_tokenizer, tokenizer_file
from ..task import MeteredLoss, Task
from .pairs import PairBatch, PairSource
from .preferences import (
    Pair,
    Preference,
    balance_lengths,
    read_preferences,
    reward_row,
    split_by_prompt,
    tokenize_pairs,
)
from .reward import RewardModel, load_reward_model, reward_loss, reward_tensors, save_reward_model
from .reward_report import RewardReport, reward_report, score_pairs

REPORT = "reward-report.json"


@dataclass(frozen=True)
class PreferenceData:
    """Where pairs come from.

    train           JSONL files of `prompt`, `chosen`, `rejected` (docs/rlhf.md); several are joined
    held_out        files that are never trained on; none: a share of the prompts of `train`
    held_out_share  that share
    skip_bad        leave broken lines out, with a warning, instead of stopping
    """

    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    held_out_share: float = field(default=0.1, metadata=SHARE)
    skip_bad: bool = False


@dataclass(frozen=True)
class RewardSettings:
    """Figures of the reward model.

    penalty     λ of λ(r_c² + r_r²), which keeps scores near zero
    balance     leave pairs out until length tells nothing
    bin_tokens  tokens of a bin of length difference, in balance and report
    """

    penalty: float = field(default=0.01, metadata=AT_LEAST_0)
    balance: bool = True
    bin_tokens: int = field(default=8, metadata=AT_LEAST_1)


@dataclass(frozen=True)
class RewardRun(RunConfig):
    """A run of this stage; `batch.rows` counts pairs."""

    data: PreferenceData = field(default_factory=PreferenceData)
    reward: RewardSettings = field(default_factory=RewardSettings)


def read_pairs(data: PreferenceData, model: ModelSettings, seed: int, limit: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs of the files, as ids."""
    if not data.train:
        raise TrainingError("`data.train` names no file of preferences", cure="data: {train: pairs.jsonl}")
    config = starting_config(model)
    tokenizer = starting_tokenizer(model, config)
    train_part, held_part = read_split(data, seed)
    pairs, held = (tokenize_pairs(part, tokenizer, config, limit=limit) for part in (train_part, held_part))
    if not pairs:
        raise TrainingError(f"no pair of {len(train_part)} fits {limit} tokens", cure="raise batch.length")
    return pairs, held


def read_split(data: PreferenceData, seed: int) -> tuple[list[Preference], list[Preference]]:
    """Training and held-out preferences; a prompt of the held-out files is never trained on."""
    found, apart = (
        [one for name in names for one in read_preferences(name, skip_bad=data.skip_bad)]
        for names in (data.train, data.held_out)
    )
    if not apart:
        return split_by_prompt(found, data.held_out_share, seed)
    known = {one.text for one in apart}
    return [one for one in found if one.text not in known], apart


def pair_loss(penalty: float, attend: Attend = sdpa_attention) -> Callable[[torch.nn.Module, PairBatch], MeteredLoss]:
    """The loss of a batch of pairs under a RewardModel."""

    def loss(model: torch.nn.Module, pairs: PairBatch) -> MeteredLoss:
        assert isinstance(model, RewardModel)
        scores = model.scores(pairs.batch, attend=attend)
        chosen, rejected = scores[0::2], scores[1::2]
        losses = reward_loss(chosen, rejected, pairs.margins, penalty=penalty)
        count = len(losses)
        with torch.no_grad():
            metrics = {
                "accuracy": ((chosen > rejected).float().sum(), count),
                "margin": ((chosen - rejected).sum(), count),
                "score_mean": (scores.sum(), 2 * count),
                "score_square": (scores.square().sum(), 2 * count),
            }
        return MeteredLoss(losses.sum(), count, metrics)

    return loss


def reward_task(
    model: RewardModel,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    settings: RewardSettings,
    *,
    seed: int = 0,
    reports: list[RewardReport] | None = None,
) -> Task:
    """What the loop runs; `evaluate` gives held-out accuracy and the gap between longer and shorter chosen answers.

    reports  gets the report of every evaluation
    """
    config = model.config
    used = balance_lengths(pairs, bin_tokens=settings.bin_tokens, seed=seed) if settings.balance else list(pairs)
    if not used:
        raise TrainingError(
            f"none of {len(pairs)} pairs is left when lengths are balanced: the longer answer always wins",
            cure="reward.balance: false, and read the report's warning; or gather other pairs",
        )

    def evaluate() -> dict[str, float]:
        if not held_out:
            return {}
        told = held_out_report(model, held_out, settings)
        if reports is not None:
            reports.append(told)
        return summary(told)

    def rows(pair: Pair) -> list[Sample]:
        return reward_row(pair, config)

    return Task(
        model=model,
        loss=pair_loss(settings.penalty),
        source=PairSource(used, rows, seed),
        held_out=PairSource(held_out, rows, shuffle=False) if held_out else None,
        evaluate=evaluate,
    )


def held_out_report(model: RewardModel, held_out: Sequence[Pair], settings: RewardSettings) -> RewardReport:
    """Score the held-out pairs and make their report."""
    return reward_report(held_out, score_pairs(model, held_out), bin_tokens=settings.bin_tokens)


def summary(report: RewardReport) -> dict[str, float]:
    """The numbers of a report that are worth a curve."""
    return {
        "held_out_accuracy": report.accuracy.accuracy,
        "length_gap": report.length_gap,
        "held_out_score_mean": report.mean,
        "held_out_score_std": report.std,
    }


def starting_reward_model(settings: ModelSettings, seed: int) -> RewardModel:
    """A reward model's folder, or a new head on a language model."""
    if settings.source is None:
        return RewardModel(starting_model(settings, seed), seed=seed)
    return load_reward_model(source_folder(settings.source), seed=seed)


def run(config: RewardRun, *, progress: Say | None = None, restart: bool = False) -> Report:
    """Train, report on held-out pairs, and write `OUT/model` and `OUT/reward-report.json`."""
    pairs, held = read_pairs(config.data, config.model, config.seed, config.batch.length)
    model = starting_reward_model(config.model, config.seed)
    reports: list[RewardReport] = []
    task = reward_task(model, pairs, held, config.reward, seed=config.seed, reports=reports)
    with joined(config.parallel, config.compute) as world:

        def exported(target: Path) -> None:
            tensors = ((name, whole(tensor)) for name, tensor in reward_tensors(model).items())
            if world.is_first:
                described = replace(model.config, torch_dtype="float32")
                save_reward_model(target, described, tensors, tokenizer_file=tokenizer_file(config.model))
            else:
                for _ in tensors:  # a collective each
                    pass

        task.exported = exported
        report = train(task, calm(config), progress=progress, restart=restart)
        if reports and report.finished and world.is_first:
            write_report(config.out / REPORT, reports[-1])
            for line in reports[-1].lines():
                (progress or (lambda text: None))(line)
        world.barrier()
    return report


def write_report(path: Path, report: RewardReport) -> None:
    """As JSON, with the derived figures."""
    figures = {**asdict(report), "length_gap": report.length_gap, "is_length_shortcut": report.is_length_shortcut}
    write_whole(path, (json.dumps(figures, indent=2, ensure_ascii=False) + "\n").encode())


def calm(config: RunConfig) -> RunConfig:
    """The run without the loop's verdict on sudden losses: these losses pass through zero, a multiple means nothing."""
    return replace(config, stability=replace(config.stability, loss_factor=0.0))
