"""Online learning in the common loop: rounds, ratios, resuming, guards. Small random policies, a rule as reward."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.errors import TrainingError
from chatglm.model import GLM
from chatglm.tokenizer import Tokenizer
from chatglm.training.loop import Report, train
from chatglm.training.rlhf.algorithms import PPO, Group, PolicyAndValue, with_value
from chatglm.training.rlhf.answers import answer_sample, one_a_row
from chatglm.training.rlhf.copying import copy_of
from chatglm.training.rlhf.experience import RewardRules, reward_answers
from chatglm.training.rlhf.guards import Guards
from chatglm.training.rlhf.online import Online, OnlineSettings
from chatglm.training.rlhf.online_evaluation import Evaluation
from chatglm.training.rlhf.ppo import PPOSettings
from chatglm.training.rlhf.reward import RewardModel
from chatglm.training.rlhf.rloo import GroupSettings
from chatglm.training.rlhf.rollout import Answer, Prompt
from chatglm.training.run_config import RunConfig
from chatglm.training.settings import build
from chatglm.training.task import ListSource, Task
from tiny_policies import prompts_of, tiny_policy, tiny_tokenizer

__all__ = ["tiny_tokenizer"]


def share_of_even(prompts: list[Prompt], answers: list[tuple[int, ...]]) -> torch.Tensor:
    """A reward that every answer has some of: the share of its tokens with an even id."""
    return torch.tensor([sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in answers])


def run_of(out: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "out": out,
        "steps": 8,
        "batch": {"rows": 8, "micro_rows": 4, "length": 32},
        "optimizer": {"lr": 3e-3, "weight_decay": 0},
        "schedule": {"kind": "constant", "warmup": 0},
        "stability": {"loss_factor": 0, "norm_factor": 0},
        "save": {"every": 0},
        "log": {"every": 1, "tensorboard": False},
        "export": {"enabled": False},
        "evaluate": {"rows": 0},
    }
    return build(RunConfig, values | changes, "test")


def online_task(
    tokenizer: Tokenizer, kind: str, *, sft: float = 0.0, epochs: int = 2, **settings: Any
) -> tuple[Task, Online]:
    """A fresh task: 16 answers a round, two walks through them."""
    policy = tiny_policy(tokenizer, spread=2.0)
    reference = copy_of(policy)
    model: torch.nn.Module = policy
    if kind in ("ppo", "shared"):
        algorithm: Any = PPO(
            PPOSettings(value_warmup=0, whiten=True, value="shared" if kind == "shared" else "separate", **settings)
        )
        model = with_value(policy, algorithm.settings)
    else:
        algorithm = Group(GroupSettings(kind=kind, answers=4, **settings))  # type: ignore[arg-type]
    known = [answer_sample(p.context, [351, 352], policy.config) for p in prompts_of(tokenizer)]
    online = Online(
        model,
        policy,
        reference,
        tokenizer,
        prompts_of(tokenizer) * 4,
        share_of_even,
        algorithm,
        OnlineSettings(prompts=16 // algorithm.answers_each, epochs=epochs, max_new=10, beta=0.01, sft=sft),
        batch_rows=8,
        rules=RewardRules(baseline="none", missing_eop_penalty=0.1),
        general=ListSource([[sample] for sample in known]),
        seed=1,
    )
    task = Task(
        model, online.loss, online, before_step=online.before_step,
        on_checkpoint=online.on_checkpoint, on_resume=online.on_resume,
    )  # fmt: skip
    return task, online


def lines_of(report: Report) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (report.out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["ppo", "shared", "rloo", "grpo"])
def test_the_first_minibatch_of_a_round_has_ratio_one_and_all_is_watched(
    kind: str, tiny_tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, online = online_task(tiny_tokenizer, kind)
    with caplog.at_level(logging.WARNING):
        report = train(task, run_of(tmp_path, steps=8))
    assert "ratio" not in caplog.text
    lines = lines_of(report)
    firsts, later = lines[0 :: online.steps_a_round], lines[online.steps_a_round - 1 :: online.steps_a_round]
    assert all(abs(line["ratio"] - 1) < 1e-3 for line in firsts)
    assert any(abs(line["ratio"] - 1) > 1e-3 for line in later)
    assert all(line["engine_ratio_error"] < 1e-3 for line in lines)
    watched = {"reward", "reward_over_baseline", "kl_k1", "kl_k3", "entropy", "clip_fraction", "answer_length"}
    watched |= {"share_without_eop", "repetition", "distinct_1", "distinct_2", "beta", "rollout_tokens_per_s"}
    assert watched <= lines[0].keys()
    assert lines[0]["kl_k1"] == pytest.approx(0, abs=1e-5) and lines[-1]["kl_k3"] > 1e-3
    if kind in ("ppo", "shared"):
        assert {"explained_variance", "value_loss"} <= lines[0].keys()


@pytest.mark.parametrize("kind", ["ppo", "rloo"])
def test_a_run_that_stopped_in_the_middle_of_a_round_goes_on_bit_by_bit(
    kind: str, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole, _ = online_task(tiny_tokenizer, kind, sft=0.5)
    train(whole, run_of(tmp_path / "whole", steps=7))
    first, _ = online_task(tiny_tokenizer, kind, sft=0.5)
    train(first, run_of(tmp_path / "parts", steps=3))  # a round has four steps
    second, _ = online_task(tiny_tokenizer, kind, sft=0.5)
    train(second, run_of(tmp_path / "parts", steps=7))
    for (name, one), other in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_while_the_value_warms_up_the_policy_stays_as_it_is(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task, online = online_task(tiny_tokenizer, "ppo", sft=0.5)
    online.algorithm.settings = replace(online.algorithm.settings, value_warmup=2)  # type: ignore[attr-defined]
    assert isinstance(task.model, PolicyAndValue) and isinstance(task.model.value, RewardModel)
    weights = [parameter.detach().clone() for parameter in task.model.policy.parameters()]
    value = task.model.value.score.weight.detach().clone()
    train(task, run_of(tmp_path, steps=2))
    assert all(torch.equal(a, b) for a, b in zip(weights, task.model.policy.parameters(), strict=True))
    assert not torch.equal(value, task.model.value.score.weight)
    train(task, run_of(tmp_path, steps=3))
    assert not all(torch.equal(a, b) for a, b in zip(weights, task.model.policy.parameters(), strict=True))


def test_the_sft_term_holds_the_policy_to_general_data(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    losses = []
    for weight in (0.0, 2.0):
        task, _ = online_task(tiny_tokenizer, "rloo", sft=weight)
        report = train(task, run_of(tmp_path / str(weight), steps=8))
        known = [answer_sample(p.context, [351, 352], task.glm.config) for p in prompts_of(tiny_tokenizer)]
        from chatglm.training.rlhf.online_evaluation import general_loss

        losses.append(general_loss(task.glm, one_a_row(known)))
        assert ("sft_loss" in lines_of(report)[0]) == (weight > 0)
    assert losses[1] < losses[0] - 0.1


def test_a_guard_ends_the_run_and_says_why(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task, online = online_task(tiny_tokenizer, "rloo")
    evaluation = Evaluation(online, prompts_of(tiny_tokenizer), Guards(kl_limit=1e-4))
    task.stops = evaluation.after_step
    said: list[str] = []
    report = train(task, run_of(tmp_path, steps=50), progress=said.append)
    assert report.finished and report.stopped is not None and "the limit is 0.0001" in report.stopped
    assert report.step == online.steps_a_round + 1
    assert any("stopped at step" in line for line in said)


def watched_run(
    tokenizer: Tokenizer, out: Path, steps: int, guards: Guards | None = None
) -> tuple[Report, Evaluation, int]:
    """A run that is evaluated and saved every other step, and how many steps it took now."""
    task, online = online_task(tokenizer, "rloo")
    evaluation = Evaluation(
        online, prompts_of(tokenizer), guards or Guards(), judge=lambda prompt, answer: len(answer) > 10
    )
    evaluation.begin()
    task.evaluate, task.stops = evaluation, evaluation.after_step
    task.on_checkpoint, task.on_resume = evaluation.on_checkpoint, evaluation.on_resume
    taken: list[int] = []
    task.before_step = lambda step: (taken.append(step), online.before_step(step))[1]
    sections = {"save": {"every": 2}, "evaluate": {"every": 2, "rows": 0}}
    return train(task, run_of(out, steps=steps, **sections)), evaluation, len(taken)


def test_what_the_guards_saw_is_remembered_when_a_run_goes_on(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, whole, _ = watched_run(tiny_tokenizer, tmp_path / "whole", 8)
    watched_run(tiny_tokenizer, tmp_path / "parts", 4)
    _, parts, taken = watched_run(tiny_tokenizer, tmp_path / "parts", 8)
    assert taken == 4 and len(whole.watchman.history) == 4
    assert parts.watchman.history == whole.watchman.history and parts.figures == whole.figures


def test_a_run_that_a_guard_stopped_stays_stopped_until_its_limit_is_another(
    tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    strict = Guards(patience=1, least_parting=-1.0)  # any rise of the reward counts as parting
    report, evaluation, _ = watched_run(tiny_tokenizer, tmp_path, 20, strict)
    assert report.stopped is not None and "reward and judge part" in report.stopped and report.step < 20
    again, _, taken = watched_run(tiny_tokenizer, tmp_path, 20, strict)
    assert (again.stopped, taken, again.finished) == (report.stopped, 0, True)
    other, resumed, taken = watched_run(tiny_tokenizer, tmp_path, report.step + 2, Guards(patience=0))
    assert taken == 2 and other.stopped is None
    assert resumed.watchman.history[: len(evaluation.watchman.history)] == evaluation.watchman.history


def test_an_evaluation_tells_judge_reward_and_what_was_forgotten(tiny_tokenizer: Tokenizer) -> None:
    _, online = online_task(tiny_tokenizer, "rloo")
    said: list[str] = []
    known = one_a_row(answer_sample(p.context, [351], online.policy.config) for p in prompts_of(tiny_tokenizer))
    evaluation = Evaluation(
        online,
        prompts_of(tiny_tokenizer),
        Guards(canaries=("sky?",)),
        judge=lambda prompt, answer: len(answer) > 10,
        alarm=share_of_even,
        general=known,
        say=said.append,
    )
    first = evaluation.begin()
    again = evaluation()
    assert {name: again[name] for name in first} == first  # nothing was learned yet
    assert (again["eval_win_rate"], again["general_loss_up"]) == (0.5, 0.0)
    assert again["eval_kl_k1"] == 0 and "eval_alarm_reward" in again
    assert len(said) == 1 and "canary 'sky?'" in said[0]


def test_a_reward_counts_from_the_reference_answer_and_a_missing_end_costs() -> None:
    prompts = [Prompt("a", (1,), reference="xx"), Prompt("b", (1,))]
    answers = [
        Answer(prompts[0], (1, 2, 3), True, ""),
        Answer(prompts[0], (1, 2, 3, 4), False, ""),
        Answer(prompts[1], (1,) * 9, True, ""),
    ]

    def length(of: Any, ids: Any) -> torch.Tensor:
        return torch.tensor([float(len(one)) for one in ids])

    rewards, scores = reward_answers(
        answers,
        length,
        RewardRules(clip=5, baseline="reference", missing_eop_penalty=0.5),
        lambda text: [0] * len(text),
    )
    assert rewards.tolist() == [3, 4, 5]
    assert scores.tolist() == [1, 1.5, 5]


def test_a_round_that_does_not_divide_into_steps_is_refused(tiny_tokenizer: Tokenizer) -> None:
    policy = tiny_policy(tiny_tokenizer)
    with pytest.raises(TrainingError, match=r"16 answers cannot be cut into steps of `batch.rows` 6"):
        Online(
            policy,
            policy,
            copy_of(policy),
            tiny_tokenizer,
            prompts_of(tiny_tokenizer),
            share_of_even,
            Group(GroupSettings()),
            OnlineSettings(prompts=4),
            batch_rows=6,
        )


def test_prompts_whose_answers_score_alike_are_left_out(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task, online = online_task(tiny_tokenizer, "rloo")
    online.reward = lambda prompts, answers: torch.ones(len(answers))
    online.rules = RewardRules(baseline="none", missing_eop_penalty=0)
    weights = [parameter.detach().clone() for parameter in task.model.parameters()]
    report = train(task, run_of(tmp_path, steps=2))
    assert lines_of(report)[0]["share_without_spread"] == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, task.model.parameters(), strict=True))


def test_the_reference_never_moves(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task, online = online_task(tiny_tokenizer, "ppo")
    before = [parameter.detach().clone() for parameter in online.reference.parameters()]
    train(task, run_of(tmp_path, steps=4))
    assert all(torch.equal(a, b) for a, b in zip(before, online.reference.parameters(), strict=True))
    assert isinstance(task.glm, GLM) and task.glm is online.policy
