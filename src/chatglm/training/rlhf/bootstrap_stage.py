"""`chatglm train bootstrap`: rounds of sampling, scoring, keeping the best, and fine-tuning on it.

A round has a folder `OUT/round-1` … of its own: what was kept (`kept.jsonl`), its training run, its figures
(`round.json`). An interrupted run goes on with the round that is not finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoint.atomic import write_whole
from ...errors import TrainingError
from ...evaluation.judges import judge_of
from ...model import GLM
from ...tokenizer import Tokenizer
from ..loop import Report, train
from ..loss import LossSum, batch_loss
from ..methods import method_name
from ..metrics import Say
from ..preparing import DTYPES, precision_of
from ..run_config import AT_LEAST_1, ModelSettings, OptimizerSettings, RunConfig
from ..samples import Batch
from ..settings import in_range
from ..sharding import World, joined
from ..starting import EMBEDDED, starting_model, starting_tokenizer
from ..task import Stream, StreamSource, Task
from ..text_stage import opened
from .bootstrap import Kept, MixedRows, best_of_n_bound, keep_best, packed_rows
from .copying import copy_of, own_device
from .experience import RewardFunction, RewardRules
from .guards import Guards, clip_rewards
from .online import Online, OnlineSettings
from .online_evaluation import Evaluation, said
from .online_stage import OnlineData, RewardChoice, check_whole, kept_whole, prompts_of, reward_of
from .pairs import permutation
from .policy import glm_in
from .reward import load_reward_model
from .reward_stage import calm
from .rloo import GroupSettings
from .rollout import Answer, Prompt, RolloutRate
from .sharing import from_all, own_stretch

REPORT = "bootstrap-report.json"
ROUND = "round.json"
KEPT = "kept.jsonl"


@dataclass(frozen=True)
class BootstrapSettings:
    """Figures of a round.

    rounds       sampling and training, one after the other
    prompts      asked in a round; None: all of them
    answers      drawn for each prompt (n of best-of-n)
    margin       by which the best must be above the median of its prompt's answers
    known_share  of the rows that are known data (data.general); at least half
    max_new      token limit of an answer
    """

    rounds: int = field(default=3, metadata=AT_LEAST_1)
    prompts: int | None = field(default=None, metadata=AT_LEAST_1)
    answers: int = field(default=4, metadata=in_range(low=2))
    margin: float = field(default=0.0, metadata=in_range(low=0))
    known_share: float = field(default=0.5, metadata=in_range(low=0.5, high=0.99))
    max_new: int = field(default=128, metadata=AT_LEAST_1)
    rollout_batch: int = field(default=64, metadata=AT_LEAST_1)


@dataclass(frozen=True)
class BootstrapRun(RunConfig):
    """A run of this stage. `steps` are those of one round; `data.general` is the SFT data that is mixed in."""

    model: ModelSettings = field(default_factory=lambda: ModelSettings(source=EMBEDDED))
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-5, weight_decay=0.0))
    data: OnlineData = field(default_factory=OnlineData)
    bootstrap: BootstrapSettings = field(default_factory=BootstrapSettings)
    reward: RewardChoice = field(default_factory=RewardChoice)
    judge: Mapping[str, Any] = field(default_factory=dict)
    guards: Guards = field(default_factory=Guards)


def check_bootstrap(config: BootstrapRun) -> None:
    """Everything that can be refused before weights are read."""
    if not config.data.train:
        raise TrainingError("`data.train` names no file of prompts", cure="data: {train: prompts.jsonl}")
    if not config.data.general:
        raise TrainingError(
            "`data.general` names no known data to mix in", cure="data.general: what the model was fine-tuned on"
        )
    if not config.reward.model and not config.reward.judge:
        raise TrainingError("nothing scores the answers", cure="reward: {model: FOLDER}, or a rule in reward.judge")
    if method_name(config) != "full":
        raise TrainingError(
            f"`method.name` is {config.method['name']}; the rounds of a bootstrap train all weights",
            cure="method: {name: full}; `chatglm train rloo` and `dpo` take adapters",
        )
    check_whole(config)
    if config.steps is None:
        raise TrainingError("`steps` of a round are missing", cure="steps: 100")


def run(config: BootstrapRun, *, progress: Say | None = None, restart: bool = False) -> Report:
    """All rounds; `OUT/model` is the last one's."""
    check_bootstrap(config)
    with joined(config.parallel, config.compute) as world:
        report = _in_group(kept_whole(config), progress or (lambda text: None), world, restart)
        world.barrier()  # the model's folder is there when any process says so
    return report


def _in_group(config: BootstrapRun, say: Say, world: World, restart: bool) -> Report:
    """The rounds within the group of the run's processes, which share every draw."""
    policy = starting_model(config.model, config.seed).to(own_device(config))
    tokenizer = starting_tokenizer(config.model, policy.config)
    bootstrap = Bootstrap(config, policy, tokenizer, say, world)
    report = bootstrap.run(restart=restart)
    if report.finished and config.export.enabled:
        report.model = config.out / "model"
        if world.is_first:
            _copied(config.out / f"round-{config.bootstrap.rounds}" / "model", report.model)
    return report


class Bootstrap:
    """The rounds of a run over one policy, whose weights are trained in place."""

    def __init__(self, config: BootstrapRun, policy: GLM, tokenizer: Tokenizer, say: Say, world: World) -> None:
        self.config, self.policy, self.tokenizer, self.say, self.world = config, policy, tokenizer, say, world
        settings = config.bootstrap
        prompts, held = prompts_of(config.data, config.seed, settings.max_new, tokenizer, policy.config)
        self.prompts: Sequence[Prompt] = prompts
        model = load_reward_model(config.reward.model, device=policy.device) if config.reward.model else None
        self.reward: RewardFunction = reward_of(config.reward, model, tokenizer)
        self.known: Stream = opened(config.data.general, config, policy.config, "data.general")
        self.skip = min(config.data.general_rows, self.known.rows_per_epoch - 1)
        watched = StreamSource(self.known).batch(0, self.skip) if self.skip > 0 else None
        self.evaluation = _evaluation(
            config, policy, tokenizer, prompts, held[: config.data.held_out_prompts], self.reward, watched
        )
        self.figures: list[dict[str, float]] = []

    def run(self, *, restart: bool = False) -> Report:
        """Round after round, those that are finished passed over."""
        first = self.evaluation.begin()
        self.say("before: " + said(first))
        report = Report(self.config.out)
        for number in range(1, self.config.bootstrap.rounds + 1):
            report = self.round(number, restart=restart)
            if not report.finished:
                break
        facts = {"before": first, "rounds": self.figures}
        self._write(self.config.out / REPORT, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        report.evaluation = {**report.evaluation, **(self.figures[-1] if self.figures else {})}
        return report

    def round(self, number: int, *, restart: bool) -> Report:
        """Sample, keep, train, evaluate; what was kept is written down first, so that an interruption costs no draw."""
        config, folder = self.config, self.config.out / f"round-{number}"
        start = copy_of(self.policy)
        if self.world.is_first:
            if restart and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
        kept, found = self.keep(number)
        self._write(folder / KEPT, "".join(_line(one) for one in kept))
        if not kept:
            raise TrainingError(
                f"round {number} kept no answer of {int(found['answers'])}: none was above its prompt's median",
                cure="lower bootstrap.margin, draw more answers, or ask other prompts",
            )
        samples = [one.answer.sample(self.policy.config) for one in kept]
        rows = packed_rows(samples, config.batch.length)
        source = MixedRows(
            rows, self.known, config.batch.length, config.bootstrap.known_share, config.seed + number, max(0, self.skip)
        )
        task = Task(self.policy, _loss, source)
        run = calm(replace(_plain(config), out=folder, seed=config.seed + number))
        report = train(task, run, progress=self.say)
        if not report.finished:
            return report
        found |= self._after(start)
        found |= {"round": number, "bound": best_of_n_bound(config.bootstrap.answers)}
        self.figures.append(found)
        self._write(folder / ROUND, json.dumps(found, indent=2) + "\n")
        self.say(f"round {number}: " + said(found))
        return report

    def keep(self, number: int) -> tuple[list[Kept], dict[str, float]]:
        """Draw the answers of a round and keep the best; figures of the draw."""
        settings, config = self.config.bootstrap, self.config
        count = min(settings.prompts or len(self.prompts), len(self.prompts))
        order = permutation(len(self.prompts), config.seed, number)
        prompts = [self.prompts[int(place)] for place in order[:count]]
        parts = from_all(lambda: self._own_part(prompts, config.seed * 1_000_003 + number))
        answers = [answer for part, _, _ in parts for answer in part]
        scores = torch.cat([part for _, part, _ in parts])
        tokens, seconds = sum(rate.tokens for _, _, rate in parts), max(rate.seconds for _, _, rate in parts)
        kept = keep_best(answers, scores, settings.answers, settings.margin)
        return kept, {
            "answers": float(len(answers)),
            "kept": float(len(kept)),
            "reward_drawn": scores.mean().item(),
            "reward_kept": sum(one.score for one in kept) / max(1, len(kept)),
            "rollout_tokens_per_s": tokens / max(seconds, 1e-9),
        }

    def _own_part(self, prompts: Sequence[Prompt], seed: int) -> tuple[list[Answer], torch.Tensor, RolloutRate]:
        """The answers that this process draws, their scores, and how fast it was."""
        own, each = own_stretch(len(prompts)), self.config.bootstrap.answers
        engine = self.evaluation.online.engine
        before = replace(engine.rate)
        answers = engine.sample(prompts[own.start : own.stop], each=each, seed=seed, first=own.start * each)
        scores = torch.empty(0)
        if answers:
            asked, ids = [answer.prompt for answer in answers], [answer.ids for answer in answers]
            scores = clip_rewards(self.reward(asked, ids).float(), self.config.guards.reward_clip)
        return answers, scores, RolloutRate(engine.rate.tokens - before.tokens, engine.rate.seconds - before.seconds)

    def _write(self, path: Path, text: str) -> None:
        if self.world.is_first:
            write_whole(path, text.encode())

    def _after(self, start: GLM) -> dict[str, float]:
        """Figures of the trained policy, against the run's start and against the round's."""
        self.policy.eval()
        return {**self.evaluation(), "kl_of_round": self.evaluation.kl(start)}


def _evaluation(
    config: BootstrapRun,
    policy: GLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    held: Sequence[Prompt],
    reward: RewardFunction,
    watched: Batch | None,
) -> Evaluation:
    """The figures of online runs; nothing is learned through it."""
    from .algorithms import Group

    settings = config.bootstrap
    narrow = DTYPES[precision_of(config.compute, policy.device)]
    online = Online(
        policy,
        policy,
        copy_of(policy).eval(),
        tokenizer,
        prompts,
        reward,
        Group(GroupSettings()),
        OnlineSettings(prompts=1, max_new=settings.max_new, rollout_batch=settings.rollout_batch),
        batch_rows=GroupSettings().answers,
        rules=RewardRules(config.guards.reward_clip, "none"),
        seed=config.seed,
        engine_dtype=None if narrow == torch.float32 else narrow,
    )
    judge = judge_of(config.judge) if config.judge else None
    return Evaluation(online, held, config.guards, judge, general=watched)


def _loss(model: nn.Module, batch: Batch) -> LossSum:
    return batch_loss(glm_in(model), batch)


def _plain(config: BootstrapRun) -> RunConfig:
    """The sections that the loop reads."""
    names = RunConfig.__dataclass_fields__
    values = {name: getattr(config, name) for name in names if name != "data"}
    return RunConfig(**values)


def _line(kept: Kept) -> str:
    answer = kept.answer
    facts = {"prompt": answer.prompt.text, "response": answer.text, "score": kept.score, "median": kept.median}
    return json.dumps(facts, ensure_ascii=False) + "\n"


def _copied(source: Path, target: Path) -> Path:
    """The last round's model under the name that every stage's has; whole or not at all."""
    temporary = target.with_name(f".{target.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return target
