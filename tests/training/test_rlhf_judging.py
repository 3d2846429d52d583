"""Judges and guards: what passes, and what stops a run."""

from __future__ import annotations

import pytest
import torch

from chatglm.errors import RequestError
from chatglm.evaluation.judges import FullSentence, judge_of, judged_rate, win_rate
from chatglm.training.rlhf.guards import AdaptiveBeta, Guards, Watchman, clip_rewards


@pytest.mark.parametrize("answer", ["It is blue.", "它是蓝色的。", 'He said "yes!"', "真的吗？”", "Wait…  "])
def test_a_full_sentence_ends_as_one(answer: str) -> None:
    assert FullSentence()("", answer)


@pytest.mark.parametrize("answer", ["It is blue", "它是蓝色的，", "", ".", "  "])
def test_what_is_no_full_sentence(answer: str) -> None:
    assert not FullSentence()("", answer)


def test_a_judge_asks_everything_that_its_description_names() -> None:
    judge = judge_of({"full_sentence": True, "keyword": ["please", "请"], "keyword_at_most": 1, "max_characters": 20})
    assert judge("", "Please sit down.")
    assert judge("", "请坐。")
    assert not judge("", "Sit down.")
    assert not judge("", "Please sit down")
    assert not judge("", "Please, please sit.")
    assert not judge("", "Please sit down on the chair.")


def test_an_unknown_or_empty_description_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown key `keywrd`"):
        judge_of({"keywrd": "x"})
    with pytest.raises(RequestError, match="nothing is asked"):
        judge_of({})


def test_rate_and_win_rate_count_what_passes() -> None:
    prompts = [""] * 4
    ours, theirs = ["a.", "ab.", "no", "no"], ["no", "ab.", "ab.", "no"]
    assert judged_rate(FullSentence(), prompts, ours) == 0.5
    result = win_rate(FullSentence(), prompts, ours, theirs)
    assert (result.wins, result.ties, result.losses, result.rate) == (1, 2, 1, 0.5)


def test_too_much_kl_stops_a_run() -> None:
    watchman = Watchman(Guards(kl_limit=4))
    assert watchman.after_step({"kl_k3": 3.9}) is None
    assert "4.10 nats" in (watchman.after_step({"kl_k3": 4.1}) or "")


def test_a_reward_that_rises_while_the_judge_falls_stops_a_run_after_its_patience() -> None:
    watchman = Watchman(Guards(patience=2))
    said = [
        watchman.after_evaluation({"reward": reward, "judged_rate": rate})
        for reward, rate in [(0.0, 0.5), (1.0, 0.9), (2.0, 0.7), (3.0, 0.5)]
    ]
    assert said[:3] == [None] * 3
    assert said[3] is not None and "from 0.90 to 0.50" in said[3]


@pytest.mark.parametrize(
    "course", [[(0, 0.5), (1, 0.9), (2, 0.95), (3, 0.94)], [(3, 0.9), (2, 0.6), (1, 0.5), (0, 0.4)]]
)
def test_progress_and_an_honest_setback_do_not(course: list[tuple[float, float]]) -> None:
    watchman = Watchman(Guards(patience=2))
    assert not any(watchman.after_evaluation({"reward": reward, "judged_rate": rate}) for reward, rate in course)


def test_the_second_reward_model_raises_the_alarm() -> None:
    watchman = Watchman(Guards(alarm_drop=0.5))
    assert watchman.after_evaluation({"reward": 0, "alarm_reward": 1.0}) is None
    assert watchman.after_evaluation({"reward": 1, "alarm_reward": 0.6}) is None
    assert "hacked" in (watchman.after_evaluation({"reward": 2, "alarm_reward": 0.4}) or "")


def test_rewards_are_cut_on_both_sides() -> None:
    assert clip_rewards(torch.tensor([-9.0, 1.0, 7.0]), 5).tolist() == [-5, 1, 5]


def test_beta_follows_its_target_and_stays_without_one() -> None:
    steered, constant = AdaptiveBeta(0.1, target=6, horizon=100), AdaptiveBeta(0.1)
    steered.update(kl=12, answers=50)
    constant.update(kl=12, answers=50)
    assert (steered.beta, constant.beta) == (pytest.approx(0.1 * 1.1), 0.1)
    steered.update(kl=0, answers=50)
    assert steered.beta == pytest.approx(0.1 * 1.1 * 0.9)
