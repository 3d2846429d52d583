"""`chatglm train ppo` and `chatglm train rloo`: a policy that learns from rewards for its own answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...checkpoint.atomic import write_whole
from ...config import ModelConfig
from ...errors import TrainingError
from ...evaluation.judges import Judge, judge_of
from ...model import GLM
from ...tokenizer import Tokenizer
from ..loop import Report, train
from ..methods import method_name, tuned
from ..metrics import Say
from ..preparing import DTYPES, precision_of
from ..run_config import AT_LEAST_0, SHARE, ModelSettings, OptimizerSettings, RunConfig
from ..samples import Batch
from ..sharding import joined
from ..starting import EMBEDDED, starting_config, starting_tokenizer
from ..task import StreamSource, Task
from ..text_stage import opened
from .algorithms import PPO, Group, with_value
from .copying import copy_of, in_dtype, own_device, without_dropout
from .experience import Baseline, ModelReward, RewardFunction, RewardRules, RuleReward
from .guards import Guards
from .online import Algorithm, Online, OnlineSettings
from .online_evaluation import Evaluation, said
from .ppo import PPOSettings
from .prompts import read_prompts, split_prompts
from .reference import FirstValues, Reference
from .reward import RewardModel, load_reward_model
from .reward_stage import calm
from .rloo import GroupSettings
from .rollout import Prompt

REPORT = "online-report.json"
SHOWN = 8
"""Answers before and after that the report shows."""


@dataclass(frozen=True)
class OnlineData:
    """What is asked, and what must not be forgotten.

    train            JSONL files of prompts, answered in training
    held_out         files that are answered at evaluations only; none: a share of the prompts of `train`
    held_out_share   that share
    held_out_prompts how many of them an evaluation answers
    general          prepared sets (`chatglm data prepare`) for the SFT term and the general loss
    general_rows     rows of them that are never trained on, whose loss is watched
    """

    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    held_out_share: float = field(default=0.1, metadata=SHARE)
    held_out_prompts: int = field(default=64, metadata=AT_LEAST_0)
    general: tuple[Any, ...] = ()
    general_rows: int = field(default=8, metadata=AT_LEAST_0)


@dataclass(frozen=True)
class RewardChoice:
    """Where rewards come from, and what is done to them.

    model         folder of a reward model (`chatglm train reward`)
    judge         a rule (±judge_weight), alone or added to the model's score; keys of evaluation.judges.judge_of
    alarm         folder of a second reward model, trained on another split, that is only watched
    baseline, missing_eop_penalty  see experience.RewardRules; scores are cut at guards.reward_clip
    """

    model: str | None = None
    judge: Mapping[str, Any] = field(default_factory=dict)
    judge_weight: float = 1.0
    alarm: str | None = None
    baseline: Baseline = "reference"
    missing_eop_penalty: float = field(default=1.0, metadata=AT_LEAST_0)


@dataclass(frozen=True)
class OnlineRun(RunConfig):
    """What both stages have; `batch.rows` counts answers. `judge` is the independent one of evaluations."""

    model: ModelSettings = field(default_factory=lambda: ModelSettings(source=EMBEDDED))
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-6, weight_decay=0.0))
    data: OnlineData = field(default_factory=OnlineData)
    online: OnlineSettings = field(default_factory=OnlineSettings)
    reward: RewardChoice = field(default_factory=RewardChoice)
    judge: Mapping[str, Any] = field(default_factory=dict)
    guards: Guards = field(default_factory=Guards)


@dataclass(frozen=True)
class PPORun(OnlineRun):
    """A run of PPO."""

    ppo: PPOSettings = field(default_factory=PPOSettings)


@dataclass(frozen=True)
class RLOORun(OnlineRun):
    """A run of RLOO or GRPO (`group.kind`)."""

    group: GroupSettings = field(default_factory=GroupSettings)


@dataclass(frozen=True)
class Sum:
    """Several rewards added."""

    parts: Sequence[tuple[float, RewardFunction]]

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> torch.Tensor:
        return torch.stack([weight * part(prompts, answers).float() for weight, part in self.parts]).sum(dim=0)


def run_ppo(config: PPORun, *, progress: Say | None = None, restart: bool = False) -> Report:
    """Train by PPO, and write `OUT/model` and `OUT/online-report.json`."""

    def made(policy: GLM, reward_model: RewardModel | None) -> tuple[torch.nn.Module, Algorithm]:
        return with_value(policy, config.ppo, reward_model), PPO(config.ppo)

    return _run(config, made, progress, restart)


def run_rloo(config: RLOORun, *, progress: Say | None = None, restart: bool = False) -> Report:
    """Train by RLOO or GRPO, and write `OUT/model` and `OUT/online-report.json`."""

    def made(policy: GLM, reward_model: RewardModel | None) -> tuple[torch.nn.Module, Algorithm]:
        return policy, Group(config.group)

    return _run(config, made, progress, restart)


Kind = TypeVar("Kind", bound=RunConfig)
Maker = Callable[[GLM, RewardModel | None], tuple[torch.nn.Module, Algorithm]]


def check_online(config: OnlineRun) -> tuple[list[Prompt], list[Prompt]]:
    """Everything that can be refused before weights are read; returns the prompts, training and held-out."""
    is_separate = isinstance(config, PPORun) and config.ppo.value == "separate"
    if method_name(config) != "full" and is_separate and not config.reward.model:
        raise TrainingError(
            f"`method.name` is {config.method['name']}, and a value model apart would be a whole copy that learns",
            cure="ppo.value: shared, or a reward.model that it starts as",
        )
    check_whole(config)
    if not config.data.train:
        raise TrainingError("`data.train` names no file of prompts", cure="data: {train: prompts.jsonl}")
    if not config.reward.model and not config.reward.judge:
        raise TrainingError("nothing gives a reward", cure="reward: {model: FOLDER}, or a rule in reward.judge")
    described = starting_config(config.model)
    tokenizer = starting_tokenizer(config.model, described)
    for settings in (config.reward.judge, config.judge):
        if settings:
            judge_of(settings)
    return prompts_of(config.data, config.seed, config.online.max_new, tokenizer, described)


def check_whole(config: RunConfig) -> None:
    """Raises TrainingError where the processes would hold parts of the policy: the engine runs whole weights."""
    if config.parallel.strategy == "fsdp" or config.parallel.tensor > 1:
        raise TrainingError(
            "roll-outs need the whole weights in every process, `parallel` asks for parts",
            cure="parallel: {strategy: ddp, tensor: 1}",
        )


def kept_whole(config: Kind) -> Kind:
    """The run with the whole policy in every process."""
    return replace(config, parallel=replace(config.parallel, strategy="ddp"))


def _run(config: OnlineRun, made: Maker, progress: Say | None, restart: bool) -> Report:
    prompts, held = check_online(config)
    with joined(config.parallel, config.compute):
        return _in_group(kept_whole(config), made, prompts, held, progress, restart)


def _in_group(
    config: OnlineRun, made: Maker, prompts: list[Prompt], held: list[Prompt], progress: Say | None, restart: bool
) -> Report:
    """The run within the group of its processes, which share every draw."""
    say = progress or (lambda text: None)
    device = own_device(config)
    tuning = tuned(config)
    policy = without_dropout(tuning.glm.to(device))
    tokenizer = starting_tokenizer(config.model, policy.config)
    reward_model = load_reward_model(config.reward.model, device=device) if config.reward.model else None
    model, algorithm = made(policy, reward_model)
    general, watched = _general(config, policy.config)
    narrow = DTYPES[precision_of(config.compute, device)]
    is_adapter = tuning.exported is not None
    reference: Reference = FirstValues.of(policy) if is_adapter else copy_of(policy).eval()
    for frozen in (reference, reward_model):
        if isinstance(frozen, torch.nn.Module):
            in_dtype(frozen, narrow)
    online = Online(
        model,
        policy,
        reference,
        tokenizer,
        prompts,
        reward_of(config.reward, reward_model, tokenizer),
        algorithm,
        config.online,
        batch_rows=config.batch.rows,
        rules=RewardRules(config.guards.reward_clip, config.reward.baseline, config.reward.missing_eop_penalty),
        general=general,
        seed=config.seed,
        engine_dtype=None if narrow == torch.float32 or is_adapter else narrow,
        kernels="torch" if is_adapter else None,  # others read the base's weights past the adapter
    )
    alarm = ModelReward(load_reward_model(config.reward.alarm, device=device)) if config.reward.alarm else None
    judge: Judge | None = judge_of(config.judge) if config.judge else None
    held = held[: config.data.held_out_prompts]
    evaluation = Evaluation(online, held, config.guards, judge, alarm, watched, say)
    first = evaluation.begin()
    say("before: " + said(first))

    def on_checkpoint(folder: Path) -> None:
        online.on_checkpoint(folder)
        evaluation.on_checkpoint(folder)

    def on_resume(folder: Path) -> None:
        online.on_resume(folder)
        evaluation.on_resume(folder)

    task = Task(
        model,
        online.loss,
        online,
        evaluate=evaluation,
        before_step=online.before_step,
        on_checkpoint=on_checkpoint,
        on_resume=on_resume,
        stops=evaluation.after_step,
        exported=tuning.exported,
    )
    report = train(task, steady(config), progress=progress, restart=restart)
    if report.finished and int(os.environ.get("RANK", "0")) == 0:
        _write_report(config.out / REPORT, first, report, evaluation)
    return report


def steady(config: OnlineRun) -> RunConfig:
    """The run without the loop's verdicts on sudden losses and norms: going back would answer other prompts."""
    calmed = calm(config)
    return replace(calmed, stability=replace(calmed.stability, norm_factor=0.0))


def prompts_of(
    data: OnlineData, seed: int, max_new: int, tokenizer: Tokenizer, described: ModelConfig
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from and held-out ones."""
    room = described.max_sequence_length - max_new - 1
    found, apart = (
        [prompt for name in names for prompt in read_prompts(name, tokenizer, most_tokens=room)]
        for names in (data.train, data.held_out)
    )
    if not apart:
        return split_prompts(found, data.held_out_share, seed)
    known = {prompt.text for prompt in apart}
    return [prompt for prompt in found if prompt.text not in known], apart


def reward_of(choice: RewardChoice, model: RewardModel | None, tokenizer: Tokenizer) -> RewardFunction:
    """The reward that a run file describes: a model, a rule, or the sum of both."""
    parts: list[tuple[float, RewardFunction]] = []
    if model is not None:
        parts.append((1.0, ModelReward(model.requires_grad_(False).eval())))
    if choice.judge:
        parts.append((choice.judge_weight, RuleReward(judge_of(choice.judge), tokenizer)))
    return Sum(parts)


def _general(config: OnlineRun, described: ModelConfig) -> tuple[StreamSource | None, Batch | None]:
    """Rows for the SFT term, and those whose loss is watched."""
    if not config.data.general:
        return None, None
    stream = opened(config.data.general, config, described, "data.general")
    rows = min(config.data.general_rows, stream.rows_per_epoch - 1)
    watched = StreamSource(stream).batch(0, rows) if rows > 0 else None
    return StreamSource(stream, first=max(0, rows)), watched


def _write_report(path: Path, first: Mapping[str, float], report: Report, evaluation: Evaluation) -> None:
    online = evaluation.online
    now = online.engine.greedy([answer.prompt for answer in evaluation.first[:SHOWN]])
    then = evaluation.greedy_at_first[:SHOWN]
    facts = {
        "before": dict(first),
        "after": report.evaluation,
        "course": evaluation.figures,
        "steps": report.step,
        "stopped": report.stopped,
        "rollout_tokens_per_s": online.engine.rate.tokens_per_second,
        "answers": [
            {"prompt": a.prompt.text, "before": a.text, "after": b.text} for a, b in zip(then, now, strict=True)
        ],
    }
    write_whole(path, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())
