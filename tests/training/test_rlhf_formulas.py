"""Advantages, losses, KL estimators: against arithmetic by hand, and against TRL where it has the same formula."""

from __future__ import annotations

import inspect
import math
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chatglm.training.rlhf.advantages import (
    gae,
    group_normalised,
    leave_one_out,
    spread_enough,
    token_rewards,
    whiten,
)
from chatglm.training.rlhf.dpo import PairScores, dpo_loss
from chatglm.training.rlhf.ppo import clipped_loss, clipped_value_loss
from chatglm.training.rlhf.reward import reward_loss
from chatglm.training.rlhf.watch import (
    answer_metrics,
    distinct,
    explained_variance,
    k3_of,
    kl_metrics,
    repetition,
)

ANSWER = torch.tensor([0, 0, 0, 1, 1])


def test_the_score_comes_with_the_last_action_and_every_action_pays_for_its_kl() -> None:
    rewards = token_rewards(torch.tensor([2.0, -1.0]), torch.tensor([0.1, 0.0, -0.2, 0.5, 0.3]), ANSWER, beta=0.5)
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 0.0, 0.1 + 2, -0.25, -0.15 - 1]))


def test_generalised_advantages_follow_the_recursion_and_stop_at_the_end_of_an_answer() -> None:
    rewards, values = torch.tensor([0.0, 0.0, 1.0, 0.0, -1.0]), torch.tensor([0.5, 0.25, 0.75, 0.1, -0.2])
    advantages, returns = gae(rewards, values, ANSWER, gamma=0.9, decay=0.8)
    delta = [0.9 * 0.25 - 0.5, 0.9 * 0.75 - 0.25, 1 - 0.75, 0.9 * -0.2 - 0.1, -1 + 0.2]
    expected = [delta[0] + 0.72 * (delta[1] + 0.72 * delta[2]), delta[1] + 0.72 * delta[2], delta[2]]
    expected += [delta[3] + 0.72 * delta[4], delta[4]]
    torch.testing.assert_close(advantages, torch.tensor(expected))
    torch.testing.assert_close(returns, advantages + values)


def test_with_decay_one_an_advantage_is_the_whole_return_less_the_value() -> None:
    rewards, values = (
        torch.tensor([0.1, 0.2, 1.0, -0.1, 0.4]),
        torch.randn(5, generator=torch.Generator().manual_seed(0)),
    )
    _, returns = gae(rewards, values, ANSWER, gamma=1.0, decay=1.0)
    torch.testing.assert_close(returns, torch.tensor([1.3, 1.2, 1.0, 0.3, 0.4]))


def test_whitening_gives_mean_zero_and_spread_one_or_keeps_the_mean() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    white, spread = whiten(values), whiten(values, shift=False)
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert spread.mean().item() == pytest.approx(3, abs=1e-5)


def test_group_baselines_by_hand() -> None:
    scores = torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 5.0])
    torch.testing.assert_close(leave_one_out(scores, 3), torch.tensor([0.0, -1.5, 1.5, 0, 0, 0]))
    torch.testing.assert_close(group_normalised(scores, 3), torch.tensor([0.0, -1.0, 1.0, 0, 0, 0]), rtol=0, atol=1e-5)
    assert spread_enough(scores, 3, 1e-4).tolist() == [True] * 3 + [False] * 3


def run_lines_of(module: Any, first: str, last: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the lines of a library from the one that begins with `first` to the one before `last` over these names.

    Its trainers compute the loss inside methods that need a whole run around them. Skips where a version has no such
    lines.
    """
    lines = inspect.getsource(module).splitlines()
    starts = [number for number, line in enumerate(lines) if line.strip().startswith(first)]
    if not starts:
        pytest.skip(f"this version of {module.__name__} has no line `{first}`")
    ends = [number for number in range(starts[0] + 1, len(lines)) if lines[number].strip().startswith(last)]
    exec(textwrap.dedent("\n".join(lines[starts[0] : ends[0]])), names)
    return names


def test_leave_one_out_advantages_equal_those_of_trl() -> None:
    trl = pytest.importorskip("trl.trainer.rloo_trainer")
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(3))
    names = {"torch": torch, "rewards": rewards, "grouped_rewards": rewards.view(-1, 4), "num_generations": 4}
    theirs = run_lines_of(trl, "scorable_counts = ", "# Normalize advantages", names)
    torch.testing.assert_close(leave_one_out(rewards, 4), theirs["advantages"])


def test_dpo_loss_by_hand() -> None:
    lengths = torch.tensor([4.0])
    policy = PairScores(torch.tensor([-2.0]), torch.tensor([-5.0]), lengths, torch.tensor([10.0]))
    reference = PairScores(torch.tensor([-3.0]), torch.tensor([-4.0]), lengths, torch.tensor([10.0]))
    loss, watched = dpo_loss(policy, reference, beta=0.1)
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.1 * 2))))
    assert watched["reward_margin"].item() == pytest.approx(0.2)
    with_sft, _ = dpo_loss(policy, reference, beta=0.1, sft=0.5)
    assert with_sft.item() == pytest.approx(loss.item() + 0.5 * 2 / 4)
    per_token, _ = dpo_loss(policy, reference, beta=1, by_length=True)
    assert per_token.item() == pytest.approx(-math.log(1 / (1 + math.exp(-(1 / 4 + 1 / 10)))))


def test_dpo_loss_equals_that_of_trl() -> None:
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    generator = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, 5, generator=generator), torch.randn(2, 5, generator=generator)
    names = {
        "F": torch.nn.functional,
        "self": SimpleNamespace(beta=0.3),
        "delta_score": (policy[0] - reference[0]) - (policy[1] - reference[1]),
    }
    theirs = run_lines_of(trl, "per_sequence_loss = -F.logsigmoid(self.beta * delta_score)", "elif ", names)
    ones = torch.ones(5)
    made, _ = dpo_loss(PairScores(*policy, ones, ones), PairScores(*reference, ones, ones), beta=0.3)
    torch.testing.assert_close(made, theirs["per_sequence_loss"])


def test_reward_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0]), torch.tensor([-0.5])
    plain = reward_loss(chosen, rejected, penalty=0)
    assert plain.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.5))))
    assert reward_loss(chosen, rejected, 1.0, penalty=0).item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.5))))
    assert (reward_loss(chosen, rejected, penalty=0.01) - plain).item() == pytest.approx(0.01 * 1.25, rel=1e-4)


def test_the_policy_loss_stops_pushing_once_the_ratio_left_the_clip() -> None:
    logprobs = torch.tensor([0.5, 0.05, -0.5, -0.5], requires_grad=True)
    loss, watched = clipped_loss(logprobs, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, 1.0]), clip=0.2)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-1.2, -math.exp(0.05), 0.8, -math.exp(-0.5)])
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0, -math.exp(0.05), 0, -math.exp(-0.5)])
    assert watched["clip_fraction"].tolist() == [1, 0, 1, 0]


def test_the_value_loss_is_the_worse_of_free_and_clipped() -> None:
    loss = clipped_value_loss(torch.tensor([1.0, 0.3]), torch.zeros(2), torch.tensor([1.0, 1.0]), clip=0.2)
    assert loss.tolist() == pytest.approx([0.8**2 / 2, 0.8**2 / 2])
    free = clipped_value_loss(torch.tensor([1.0, 0.3]), torch.zeros(2), torch.ones(2), clip=0)
    assert free.tolist() == pytest.approx([0, 0.7**2 / 2])


def test_both_kl_estimators_have_the_exact_kl_as_mean() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2])
    reference = torch.tensor([0.2, 0.3, 0.5])
    exact = (policy * (policy / reference).log()).sum().item()
    log_ratio = (policy / reference).log()
    assert (policy * log_ratio).sum().item() == pytest.approx(exact)
    assert (policy * k3_of(log_ratio)).sum().item() == pytest.approx(exact)
    assert (k3_of(log_ratio) >= 0).all()
    assert kl_metrics(log_ratio, torch.tensor([0, 0, 1]), 2)["kl_k1"] == pytest.approx(log_ratio.sum().item() / 2)


def test_what_answers_look_like() -> None:
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(0.2)
    assert repetition([1, 2], 4) == 0
    assert distinct([[1, 1, 2], [1, 3]], 1) == pytest.approx(3 / 5)
    metrics = answer_metrics([[1, 2, 3], [4]], [True, False])
    assert (metrics["answer_length"], metrics["share_without_eop"]) == (2, 0.5)


def test_explained_variance_is_one_for_a_perfect_and_zero_for_a_constant_value() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((3,), 7.0), returns) == pytest.approx(0, abs=1e-6)
